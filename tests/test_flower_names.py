"""What a Flower app names and imports: loaded, or refused with what it is and where it went."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim.errors import UserError
from fedsim.flower_names import loaded

_APPS = """
import flwr
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

def main(grid, context): ...
server, client, number = ServerApp(), ClientApp(), 3
"""


@pytest.fixture
def module(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new module with the given source; its name."""
    name = f"their_module_{abs(hash(request.node.name))}"
    (tmp_path / f"{name}.py").write_text(getattr(request, "param", _APPS))
    monkeypatch.syspath_prepend(tmp_path)
    return name


def test_apps_are_loaded(module: str) -> None:
    assert type(loaded(f"{module}:server", "serverapp")).__name__ == "ServerApp"
    assert type(loaded(f"{module}:client", "clientapp")).__name__ == "ClientApp"


@pytest.mark.parametrize(
    ("name", "part", "said"),
    [
        ("main", "serverapp", "is a function, not a flwr.serverapp.ServerApp; give an object such as"),
        ("number", "clientapp", "is a int, not a flwr.clientapp.ClientApp"),
        ("server", "clientapp", "are the server app and the client app swapped?"),
        ("client", "serverapp", "are the server app and the client app swapped?"),
        ("ClientApp", "clientapp", r"is the class ClientApp, .* such as app = ClientApp\(\)"),
        ("nothing", "clientapp", "has no attribute 'nothing'"),
    ],
)
def test_what_is_no_app_is_named(module: str, name: str, part: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        loaded(f"{module}:{name}", part)
    assert f"{part} = '{module}:{name}'" in str(caught.value)


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (
            "from flwr.common.record import (\n    ParametersRecord,\n    RecordDict)",
            "RecordDict is in flwr.app",
        ),
        ("from flwr.client.typing import ClientFnExt", "no longer"),
        ("from flwr.server.client_proxy import ClientProxy, Nothing", "no longer"),
        ("from flwr.common import weights_to_parameters", "no longer"),
        ("import flwr.server.driver", "no longer"),
        ("import flwr.common\nflwr.common.FitInstructions", "no longer"),
        ("import flwr as fl\nfl.server.FedAvg", "FedAvg is in flwr.serverapp.strategy"),
    ],
    indirect=["module"],
)
def test_names_that_flower_has_no_longer(module: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        loaded(f"{module}:app", "serverapp", "flwr[simulation]>=1.13.1")
    assert "Flower moved its modules in 1.31 and 1.32" in str(caught.value)
    assert "the app asks for 'flwr[simulation]>=1.13.1'" in str(caught.value)


@pytest.mark.parametrize("module", ["import flwr_dataset", "from os import nothing_like_it"], indirect=True)
def test_names_of_others_are_not_flowers(module: str) -> None:
    with pytest.raises(UserError, match="is what the app needs installed"):
        loaded(f"{module}:app", "clientapp")


@pytest.mark.parametrize("module", ["import math\nmath.tau_squared"], indirect=True)
def test_mistakes_of_the_app_keep_their_traceback(module: str) -> None:
    with pytest.raises(AttributeError, match="tau_squared"):
        loaded(f"{module}:app", "clientapp")


@pytest.mark.parametrize(
    "module",
    [
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('must')\np.parse_args([])",
        "import sys\nsys.exit(2)",
    ],
    indirect=True,
)
def test_a_module_that_ends_the_process_is_named(module: str) -> None:
    with pytest.raises(UserError, match=r"a module calls sys.exit\(2\) when it is imported"):
        loaded(f"{module}:app", "clientapp")
