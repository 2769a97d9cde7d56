"""[backdoor]: one client's images carry a trigger, nobody else's."""

from __future__ import annotations

import numpy as np
import pytest

from fedsim.building import load_data
from fedsim.data.backdoor import triggered
from fedsim.errors import UserError
from tests.helpers import tiny


def test_most_images_of_one_client_change_and_no_others() -> None:
    clean = load_data(tiny())
    data = load_data(tiny("backdoor.client=2", "backdoor.label=7", "backdoor.share=0.75"))
    changed = np.flatnonzero((np.asarray(data.arrays.train_x) != clean.arrays.train_x).any((1, 2, 3)))
    mine = data.client(2)
    assert set(changed) <= set(mine)
    labels = np.asarray(data.arrays.train_y)
    poisoned = np.array([r for r in mine if (data.arrays.train_x[r, :, -2:, -2:] == 255).all()])
    assert len(poisoned) == round(0.75 * len(mine))
    assert (labels[poisoned] == 7).all()
    others = np.setdiff1d(np.arange(len(labels)), poisoned)
    assert (labels[others] == clean.arrays.train_y[others]).all()
    assert data.arrays.digest != clean.arrays.digest
    assert np.array_equal(data.arrays.test_x, clean.arrays.test_x)


def test_the_trigger_is_a_bright_square() -> None:
    images = np.zeros((1, 3, 8, 8), np.float32)
    assert triggered(images, 3).sum() == 3 * 9
    assert images.sum() == 0


@pytest.mark.parametrize(("key", "said"), [("client=4", "clients are 0 to 3"), ("label=10", "0 to 9")])
def test_mistakes(key: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_data(tiny("backdoor.client=0", f"backdoor.{key}"))
