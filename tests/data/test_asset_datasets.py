"""Datasets made of assets: small real ones, and subsets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fedsim.data import assets
from fedsim.data.store import load_arrays
from fedsim.errors import UserError

Asset = Callable[..., list[Path]]


def test_efficientnet_lite0_is_the_model_of_timm(asset: Asset) -> None:
    import timm

    (folder,) = asset("efficientnet-lite0")
    assets.verify("efficientnet-lite0")
    weights = load_file(folder / "model.safetensors")
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    assert {name: tuple(t.shape) for name, t in model.state_dict().items()} == {
        name: array.shape for name, array in weights.items()
    }
    assert sum(p.numel() for p in model.parameters()) == 4_652_008


def test_hapt_is_the_data_set_of_uci(asset: Asset) -> None:
    (folder,) = asset("hapt")
    assets.verify("hapt")
    user = np.load(folder / "user.npy")
    found = load_arrays("hapt", {})
    assert len(user) == 10_411  # 10,929 windows of the original, less 518 of postural transitions
    assert found.train_x.shape[1:] == (128, 6)
    assert set(np.asarray(found.groups)) == set(range(30))
    assert len(found.test_y) == pytest.approx(0.2 * len(user), rel=0.01)
    seen = {window.tobytes() for window in found.train_x[:, -64:]}
    assert not seen & {window.tobytes() for window in found.test_x[:, :64]}
    assert found.attributes[0].name == "user"
    assert found.train_z is not None
    np.testing.assert_array_equal(found.train_z[:, 0], found.groups)
    users = load_arrays("hapt", {"test": "users"})
    assert len(np.unique(users.groups)) == 21
    assert len(users.train_y) + len(users.test_y) == len(user)


def test_adult_is_the_training_part_of_uci(asset: Asset) -> None:
    """Counts as published: 7,841 of 32,561 earn more, 10,771 are women."""
    asset("adult")
    assets.verify("adult")
    found = load_arrays("adult", {})
    assert found.train_z is not None
    assert found.test_z is not None
    y, z = np.concatenate([found.train_y, found.test_y]), np.concatenate([found.train_z, found.test_z])
    assert (len(y), int(y.sum())) == (32_561, 7_841)
    assert [a.name for a in found.attributes] == ["gender", "ethnicity"]
    assert found.attributes[0].values == ("female", "male")
    assert int((z[:, 0] == 0).sum()) == 10_771
    assert found.train_x[:, 0].max() == pytest.approx(0.9)  # 90 years
    assert np.unique(found.train_x[:, 5:]).tolist() == [0, 1]
    small = load_arrays("adult", {"train_samples": 500, "test_samples": 100})
    assert (len(small.train_y), len(small.test_y)) == (500, 100)


@pytest.fixture
def words(asset: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer with five words in the place of the sentence encoder's."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    (vader,) = asset("vader")
    known = {"[PAD]": 0, "[UNK]": 1, "the": 2, "good": 3, "not": 4}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(assets, "path", lambda name: {"vader": vader, "minilm": tmp_path}[name])
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))  # not the true dataset


@pytest.mark.usefixtures("words")
def test_sentiment_has_four_domains_and_a_stratified_test() -> None:
    found = load_arrays("sentiment", {"max_tokens": 16})
    assert found.train_x.dtype == np.int32
    assert found.train_x.shape == (12_340, 16)
    assert len(found.test_y) == 3_085
    assert np.bincount(found.groups).tolist() == [2079, 7218, 1907, 1136]
    assert np.mean(found.train_y) == pytest.approx(np.mean(found.test_y), abs=1e-3)
    assert set(np.unique(found.train_x)) == {0, 1, 2, 3, 4}
    few = load_arrays("sentiment", {"max_tokens": 16, "train_samples": 400, "test_samples": 100})
    more = load_arrays("sentiment", {"max_tokens": 16, "train_samples": 401})
    assert (len(few.train_y), len(few.test_y)) == (400, 100)
    assert np.mean(few.train_y) == pytest.approx(np.mean(found.train_y), abs=0.01)
    large = {(row.tobytes(), group) for row, group in zip(more.train_x, more.groups, strict=True)}
    assert {(row.tobytes(), group) for row, group in zip(few.train_x, few.groups, strict=True)} <= large
    with pytest.raises(UserError, match="max_tokens must be from 3 to 512"):
        load_arrays("sentiment", {"max_tokens": 2})
    with pytest.raises(UserError, match="train_samples = 99999"):
        load_arrays("sentiment", {"train_samples": 99_999})


def test_sentences_in_the_words_of_another_tokenizer(asset: Asset, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    asset("vader", "minilm")

    def folder(name: str, words: list[str]) -> dict[str, object]:
        made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        (tmp_path / name).mkdir()
        made.save(str(tmp_path / name / "tokenizer.json"))
        return {"max_tokens": 8, "tokenizer": str(tmp_path / name)}

    good = folder("good", ["[PAD]", "?", "movie"])
    for _ in range(2):  # computed, then from the store
        found = load_arrays("sentiment", good)
        assert found.vocabulary == 3
        assert set(np.unique(found.train_x)) == {0, 1, 2}
        assert found.padding == 0
    assert load_arrays("sentiment", {"max_tokens": 16}).vocabulary == 30522
    with pytest.raises(UserError, match=r"no padding token \(looked for \[PAD\], <pad>\).*pad_token"):
        load_arrays("sentiment", folder("bad", ["movie", "?"]))
    with pytest.raises(UserError, match=r"\[data\] tokenizer: there is no .*tokenizer\.json"):
        load_arrays("sentiment", {"tokenizer": str(tmp_path)})


def test_image_subsets_are_stratified_and_fixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    for part, count in (("train", 200), ("test", 50)):
        np.save(tmp_path / f"{part}_x.npy", rng.integers(0, 256, (count, 3, 32, 32), np.uint8))
        np.save(tmp_path / f"{part}_y.npy", rng.permutation(count) % 10)
    monkeypatch.setattr(assets, "path", lambda name: tmp_path)
    monkeypatch.setenv("FEDSIM_CACHE", str(tmp_path / "cache"))  # not the true dataset
    whole = load_arrays("cifar10", {})
    assert (len(whole.train_y), len(whole.test_y)) == (200, 50)
    part = load_arrays("cifar10", {"train_samples": 40, "test_samples": 20})
    assert np.bincount(part.train_y).tolist() == [4] * 10
    assert np.bincount(part.test_y).tolist() == [2] * 10
    images = [image.tobytes() for image in whole.train_x]
    positions = [images.index(image.tobytes()) for image in part.train_x]
    assert positions == sorted(positions)
    assert part.train_y.tolist() == [whole.train_y[position] for position in positions]


def test_a_dataset_without_its_asset_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDSIM_ASSETS", str(tmp_path))
    with pytest.raises(UserError, match="fedsim assets fetch cifar10"):
        load_arrays("cifar10", {"test_samples": 7})
