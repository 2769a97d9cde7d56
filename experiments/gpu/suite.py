"""`pytest -m gpu` as a part of the queue: every test's outcome and seconds in one JSON file.

python experiments/gpu/suite.py
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

import common


def outcome(case: ElementTree.Element) -> str:
    """passed, or failed and why in one line."""
    for kind in ("failure", "error", "skipped"):
        found = case.find(kind)
        if found is not None:
            return f"{kind}: {found.get('message', '')[:300]}"
    return "passed"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the tests, write the file; `--tiny` collects them only. Exits like pytest."""
    parser = common.arguments("suite", __doc__)
    parser.add_argument("--parallel", type=int, default=1, help="processes (needs pytest-xdist)")
    given = parser.parse_args(argv)
    report = common.Report(given)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        command = [sys.executable, "-m", "pytest", "-m", "gpu", "tests/test_gpu.py", f"--junit-xml={file}"]
        # another torch than the one that the package pins may warn of something new: that is no failure here
        command += ["-o", "filterwarnings=default"]
        command += ["-n", str(given.parallel)] if given.parallel > 1 else []
        command += ["--collect-only"] if given.tiny else []
        try:
            code = subprocess.run(command, cwd=common.ROOT, timeout=given.seconds, check=False).returncode
        except subprocess.TimeoutExpired:
            report.add(stopped=f"after {given.seconds} s")
            sys.exit(1)
        cases = [] if given.tiny else list(ElementTree.parse(file).getroot().iter("testcase"))
    for case in cases:
        report.rows.append(
            {"test": case.get("name"), "outcome": outcome(case), "seconds": float(case.get("time", 0))}
        )
    report.add(tests=len(cases), passed=sum(outcome(case) == "passed" for case in cases))
    sys.exit(code)


if __name__ == "__main__":
    main()
