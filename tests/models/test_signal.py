"""The small network for sensor signals."""

from __future__ import annotations

import pytest
import torch

from fedsim.errors import UserError
from fedsim.models.base import DataInfo, run_units, units_of
from fedsim.models.cnn import signal_cnn

DATA = DataInfo(("walking", "sitting"), (128, 6), dtype="float32")


def test_units_are_the_forward_pass_and_time_is_averaged() -> None:
    torch.manual_seed(0)
    model = signal_cnn(DATA, width=8)
    x = torch.randn(3, 128, 6)
    assert model(x).shape == (3, 2)
    assert model.backbone(x).shape == (3, 16)
    torch.testing.assert_close(run_units(units_of(model.backbone), x), model.backbone(x))
    owned = [
        n for n, _ in model.backbone.named_parameters() if sum(u.owns(n) for u in model.backbone.units()) == 1
    ]  # type: ignore[operator]
    assert owned == [n for n, _ in model.backbone.named_parameters()]


def test_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"takes signals \[time, channels\], the data are \[1, 8, 8\]"):
        signal_cnn(DataInfo(("a", "b"), (1, 8, 8)))
