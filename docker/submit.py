"""Submit a run to a SuperLink, show its log, and exit with its fate.

    python docker/submit.py APP SUPERLINK 'experiment="quickstart" overrides="rounds=2"'

`flwr run --stream` returns 0 even when the ServerApp crashed, so the status is asked for afterwards.
Uses the standard library and the `flwr` command alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

#: seconds to wait for the status after the log ended
PATIENCE = 60


def flwr(*arguments: str) -> dict[str, Any]:
    """Run `flwr ... --format json` and return what it says."""
    done = subprocess.run(
        ["flwr", *arguments, "--format", "json"], capture_output=True, text=True, check=False
    )
    try:
        # the object may follow lines of chatter
        said: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    except ValueError:
        sys.exit(f"flwr {arguments[0]} failed:\n{done.stdout}{done.stderr}")
    if not said.get("success", done.returncode == 0):
        sys.exit(f"flwr {arguments[0]} failed: {json.dumps(said)}\n{done.stderr}")
    return said


def main(app: str, superlink: str, run_config: str) -> int:
    """Submit, follow, report."""
    run_id = str(flwr("run", app, superlink, "--run-config", run_config)["run-id"])
    print(f"run {run_id} submitted", flush=True)
    subprocess.run(["flwr", "log", run_id, superlink, "--stream"], check=False)
    status, details = "unknown", ""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        row = flwr("ls", superlink, "--run-id", run_id)["runs"][0]
        status, details = row["status"], row.get("status-details", "")
        if status.startswith("finished"):
            break
        time.sleep(1)
    print(f"run {run_id} {status} {details}".rstrip(), flush=True)
    return 0 if status == "finished:completed" else 1


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
