"""What workers print, and what modules find around them in a worker; without Ray where it goes without."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from fedsim import simulate
from fedsim.engine.output import Output, pass_on
from fedsim.engine.surroundings import Surroundings
from fedsim.errors import UserError


def worker(program: str, *paths: str) -> list[str]:
    """Lines that a process prints which catches its output; `told` prints past the catch."""
    start = f"""
        import os, sys, logging, subprocess
        past = os.fdopen(os.dup(1), "w")
        def told(*values): print(*values, file=past, flush=True)
        from fedsim.engine.output import Capture
        capture = Capture({list(paths)!r})
        """
    done = subprocess.run(
        [sys.executable, "-c", dedent(start) + dedent(program)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout.splitlines()


@pytest.fixture
def output() -> Output:
    return Output()


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory")
def test_prints_logs_and_children_are_caught_once(output: Output) -> None:
    lines = worker(
        """
        print("one")
        subprocess.run(["echo", "two"])
        logging.warning("three")
        told(capture.taken())
        told(capture.taken())
        print("four")
        told(capture.taken())
        """,
        *output.paths,
    )
    assert lines == ["['one\\ntwo\\n', 'WARNING:root:three\\n']", "[]", "['four\\n', '']"]


def test_other_machines_use_temporary_files_and_without_paths_nothing_is_caught() -> None:
    program = """
        print("one")
        told(capture.taken())
        """
    assert worker(program, "", "") == ["['one\\n', '']"]
    assert worker(program) == ["one", "[]"]


@pytest.mark.skipif(sys.platform != "linux", reason="files in memory")
def test_what_a_dead_process_printed_last(output: Output) -> None:
    program = """
        print("usage: x")
        capture.taken()
        print("\\033[31mhot\\033[0m")
        os.write(2, b"dying")
        os._exit(3)
        """
    assert worker(program, *output.paths) == []
    assert output.last() == "hot | dying"


def test_a_flood_is_cut_and_counted() -> None:
    program = """
        print("x" * 100_000)
        text = capture.taken()[0]
        told(text[:25], len(text) < 70_000)
        """
    assert worker(program, "", "") == ["[34,465 bytes left out]", "x True"]


def test_lines_have_the_number_of_their_client(capsys: pytest.CaptureFixture[str]) -> None:
    pass_on(7, ["a\n\nb", "10 %\r20 %\r\n"])
    pass_on(8, ["", ""])
    found = capsys.readouterr()
    assert found.out == "client 7: a\nclient 7: \nclient 7: b\n"
    assert found.err == "client 7: 20 %\n"


def test_a_terminal_that_lacks_a_letter_does_not_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    pass_on(3, ["d\u00e9j\u00e0 vu\n", ""])
    assert raw.getvalue() == b"client 3: d?j? vu\n"


def test_a_worker_has_the_drivers_arguments_variables_and_filters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And loses with the next simulation what the driver has no longer."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--lr", "0.5"])
    monkeypatch.setenv("THEIRS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.chdir(tmp_path)
    first = Surroundings.here(near=True)
    assert "CUDA_VISIBLE_DEVICES" not in first.environment
    assert "THEIRS" not in Surroundings.here(near=False).environment
    script = f"""
import os, sys, warnings, logging
from dataclasses import replace
from fedsim.engine.surroundings import Surroundings
def facts(): return sys.argv, os.environ.get("THEIRS"), os.getcwd(), logging.getLogger("quiet").level
silent = (("ignore", None, UserWarning, None, 0),)
first = Surroundings(
    {first.argv!r}, {first.path!r}, {first.folder!r}, {{"THEIRS": "1"}}, silent, {{"quiet": 40}}, False
)
first.adopt(None)
print(facts()); warnings.warn("not seen")
second = replace(first, argv=("other.py",), environment={{}}, filters=(), levels={{"quiet": 0}})
second.adopt(first)
print(facts())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == [
        f"(['train.py', '--lr', '0.5'], '1', {str(tmp_path)!r}, 40)",
        f"(['other.py'], None, {str(tmp_path)!r}, 0)",
    ]
    assert done.stderr == ""


def test_a_module_that_ends_a_worker_in_good_order_is_an_error() -> None:
    """Ray takes sys.exit for the end of the worker, and hides why."""
    done = worker(
        """
        import ray.cloudpickle
        from fedsim.engine.surroundings import Surroundings
        from fedsim.engine.worker import Setup, Worker

        class App:
            def __reduce__(self): return sys.exit, (4,)

        app, here = ray.cloudpickle.dumps(App()), Surroundings.here(near=True)
        try:
            Worker().equip(Setup(app, 1, {}, here, 1, 60.0, None, False, False), near=False)
        except RuntimeError as error:
            told(error)
        """
    )
    assert done == ["a module of the app calls sys.exit(4) at import"]


# ---------------------------------------------------------------------------------------- with Ray

_TALKER = """
import argparse, logging, os, sys
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

parser = argparse.ArgumentParser()
parser.add_argument("--word", required=True)
WORD = parser.parse_args().word
print("imported")
app = ClientApp()

@app.query()
def query(message, context):
    who = context.node_config["partition-id"]
    print(WORD, who, os.environ["THEIRS"])
    logging.getLogger("theirs").warning("logged")
    if who == 1:
        os.write(2, b"the last word")
        os._exit(7)
    return Message(RecordDict(), reply_to=message)
"""

_DYING = """
import os
from flwr.clientapp import ClientApp
app = ClientApp()

@app.query()
def query(message, context): ...

if os.environ["THEIRS"] != str(os.getpid()):
    print("no licence found", flush=True)
    os._exit(5)
"""


def _simulated(app: ClientApp, clients: int) -> list[Message]:
    server = ServerApp()
    replies: list[Message] = []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        nodes = grid.get_node_ids()
        out = [Message(RecordDict(), dst_node_id=node, message_type="query") for node in nodes]
        replies.extend(grid.send_and_receive(out))

    simulate(server, app, clients, engine="ray", workers=1)
    return replies


@pytest.mark.usefixtures("shared_ray")
def test_what_clients_print_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "talker.py").write_text(_TALKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", "--word", "hello"])
    monkeypatch.setenv("THEIRS", "41")
    import talker  # type: ignore[import-not-found]

    replies = _simulated(talker.app, 3)
    found = capsys.readouterr()
    lines = sorted(line for line in found.out.splitlines() if "(raylet)" not in line)
    assert lines == ["client 0: hello 0 41", "client 2: hello 2 41", "imported"]
    assert "logged" in found.err
    [reason] = [str(reply.error.reason) for reply in replies if reply.has_error()]
    assert "Its last output: hello 1 41 |" in reason
    assert "the last word" in reason


@pytest.mark.usefixtures("shared_ray")
def test_a_worker_that_dies_while_it_starts_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text(_DYING)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("THEIRS", str(os.getpid()))
    import dying  # type: ignore[import-not-found]

    with pytest.raises(
        UserError, match=r"workers die while they start: .* Its last output: no licence found"
    ):
        _simulated(dying.app, 1)
