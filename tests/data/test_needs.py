"""What is missing is named at once, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedsim import building
from fedsim.config import load
from fedsim.errors import UserError


def test_all_missing_assets_are_named_with_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of data and model together; a damaged one is told from an absent one."""
    monkeypatch.setenv("FEDSIM_ASSETS", str(tmp_path))
    (tmp_path / "minilm").mkdir()
    with pytest.raises(UserError) as caught:
        building.build(load("fedtune_bias_cifar10"))
    assert str(caught.value) == (
        "asset 'cifar10' is not on this machine and asset 'efficientnet-lite0' is not on this machine and "
        "asset 'minilm' is damaged: fedsim assets fetch cifar10 efficientnet-lite0 minilm"
    )
