"""The first sign of life comes before anything heavy is imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.helpers import tiny

#: Runs each command in one process in which nothing heavy can be imported, and says what it printed first.
PROGRAM = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "flwr", "ray", "pandas", "sklearn", "matplotlib"}:
            raise ImportError(f"heavy: {name}")

sys.meta_path.insert(0, Refuse())
from typer.testing import CliRunner
from fedsim import foreign
from fedsim.cli import app
foreign.launch = lambda description: 0
for line in sys.argv[1:]:
    result = CliRunner().invoke(app, line.split())
    first = (result.stderr if "--json" in line else result.output).partition("\\n")[0]
    print(line, first, "heavy" in result.output, result.stdout.count("loading"), sep=" | ")
"""
COMMANDS = {
    "run tiny.toml": "tiny: loading torch and Flower",
    "run": "quickstart: loading torch and Flower",
    "run tiny.toml --json": "tiny: loading torch and Flower",
    "run app --clients 3": "app: loading torch and Flower",
    "resume runs/mine": "mine: loading torch and Flower",
    "sweep tiny.toml --grid seed=0,1": "sweep of tiny: loading torch and Flower",
    "forget runs/mine --class 3": "forgetting in mine: loading torch and Flower",
    "forget runs/mine --attribute age": "erasing in mine: loading torch and Flower",
    "compare runs/a runs/b": "compare: loading torch and Flower",
    "memory tiny.toml": "memory of tiny: loading torch and Flower",
    "list partitions --of tiny.toml": "list tiny.toml: loading torch and Flower",
    "export runs/mine": "export of mine: loading torch and Flower",
    "bench": "bench: loading torch and Flower",
}
#: what other programs read, or write: the sign of life is on stderr
ASIDE = ("compare", "memory", "list", "export", "bench", "run app")


def test_the_first_line_comes_before_torch_and_flower(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(tiny().toml())
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "pyproject.toml").write_text(
        '[tool.flwr.app.components]\nserverapp = "a:b"\nclientapp = "a:c"\n'
    )
    command = [sys.executable, "-c", PROGRAM, *COMMANDS, "doctor"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    *seen, last = (line.split(" | ") for line in done.stdout.splitlines())
    for (said, first, heavy, on_stdout), (line, expected) in zip(seen, COMMANDS.items(), strict=True):
        assert (said, first) == (line, expected)
        assert heavy == str(not line.startswith("run app")), "it went on to import what is heavy"
        quiet = line.startswith(ASIDE) or "--json" in line
        assert on_stdout == str(int(not quiet)), line
    assert last[1].startswith("✓ python"), "doctor says what it finds as it goes"
    assert last[2] == "True"
