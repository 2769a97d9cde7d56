"""`fedsim forget`: from a finished run and a request to runs that forget, retrain and relearn, side by side.

runs/x                        the run: never touched
runs/x-forget-class-9/        one request
    prune/ not/ ...           ordinary run folders, one a method, each with a lineage.json
    retrain/ retrain-2/       the same recipe without the data, two seeds: what forgetting means
    relearn-prune/ ...        a few rounds with the data back
    report.json report.md curves.png
"""
