"""Every test session has a cache of its own and one thread."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Tests compare with numbers of a CPU: a GPU is hidden, unless those that need one are asked for."""
    if config.getoption("markexpr") != "gpu":
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True, scope="session")
def _own_cache_and_one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from fedsim.data.assets import assets_folder

    before = os.environ.get("FEDSIM_CACHE")
    os.environ["FEDSIM_ASSETS"] = str(assets_folder())  # fetched once a machine, checked by their digests
    os.environ["FEDSIM_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    torch.set_num_threads(1)
    yield
    if before is None:
        del os.environ["FEDSIM_CACHE"]
    else:
        os.environ["FEDSIM_CACHE"] = before
