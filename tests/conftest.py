"""What every test has: a cache of its own, no assets unless it asks, one thread, no traces of other tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from fedsim.data import assets


def pytest_configure(config: pytest.Config) -> None:
    """Tests compare with numbers of a CPU: a GPU is hidden, unless those that need one are asked for."""
    if config.getoption("markexpr") != "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True, scope="session")
def machine_assets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The machine's folder of assets. Tests see an empty one, and no FEDSIM_* variable of the user."""
    folder = assets.assets_folder()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("FEDSIM_") and name != "FEDSIM_OFFLINE"]:
            patch.delenv(name)
        patch.setenv("FEDSIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("FEDSIM_ASSETS", str(tmp_path_factory.mktemp("assets")))
        torch.set_num_threads(1)
        yield folder


@pytest.fixture
def asset(machine_assets: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Path]]:
    """`asset("minilm", ...)`: folders of real assets, which the rest of the test can use.

    They are fetched once a machine and checked by their digests; the test is skipped where their source
    cannot be reached.
    """

    def fetched(*names: str) -> list[Path]:
        monkeypatch.setenv("FEDSIM_ASSETS", str(machine_assets))
        found = [_fetched(machine_assets, name) for name in names]
        for one in found:
            if isinstance(one, str):
                pytest.skip(one)
        return [Path(one) for one in found]

    return fetched


@cache
def _fetched(root: Path, name: str) -> Path | str:
    """An asset's folder, or why it cannot be fetched: a registry that is out of reach is asked once."""
    try:
        return assets.fetch([name])[0]
    except assets.Unreachable as error:
        return str(error)


@pytest.fixture(autouse=True)
def _leaves_no_traces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test changes in the process would make the next one depend on it: settings must be put back.

    Modules and module paths of temporary folders are taken out here; fedsim adds them on purpose.
    """
    before, path = _settings(), list(sys.path)
    yield
    sys.path[:] = path
    base = str(tmp_path_factory.getbasetemp())
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(base):
            del sys.modules[name]
    assert _settings() == before, "a test must put back what it changes in the process"


def _settings() -> dict[str, object]:
    return {
        "folder": os.getcwd(),
        "environment": {key: value for key, value in os.environ.items() if key.startswith("FEDSIM_")},
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "type": torch.get_default_dtype(),
    }
