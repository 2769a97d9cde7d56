"""The queue: every script in turn, in a process of its own that is stopped when it takes too long.

python experiments/gpu/run.py                               all, on the GPU, at most 4 minutes each
python experiments/gpu/run.py memory clip_vit --out found   some of them, files in another folder
python experiments/gpu/run.py --device cpu --tiny           the same commands as a rehearsal
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
SCRIPTS = ("suite", "throughput", "memory", "clip_vit", "forget")
_GRACE = 60  #: seconds to end what was begun


def main(argv: Sequence[str] | None = None) -> int:
    """Run them; 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", nargs="*", help=f"of {', '.join(SCRIPTS)} (default: all)")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results", help="folder of the files")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--seconds", type=int, default=240, help="for each script")
    given = parser.parse_args(argv)
    unknown = [name for name in given.script if name not in SCRIPTS]
    if unknown:
        parser.error(f"no script '{unknown[0]}'; there are {', '.join(SCRIPTS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in given.script or SCRIPTS:
        command = [sys.executable, str(HERE / f"{name}.py"), "--out", str(given.out / f"gpu_{name}.json")]
        command += ["--device", given.device, "--seconds", str(given.seconds)]
        command += ["--tiny"] if given.tiny else []
        began = time.monotonic()
        try:
            code = subprocess.run(command, timeout=given.seconds + _GRACE, check=False).returncode
        except subprocess.TimeoutExpired:
            code = "stopped"
        failed += code != 0
        print(f"{name}: {code or 'done'}, {time.monotonic() - began:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
