"""Datasets out of fetched assets (`fedsim assets fetch NAME`); a function here is a name of `[data]`.

Test sets, subsets and their order are fixed, whoever asks for them: smaller subsets lie within larger ones.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fedsim.data import assets
from fedsim.data.asset_table import ASSETS
from fedsim.data.attributes import Attribute, coded
from fedsim.data.needs import needs
from fedsim.data.sources import UNDIVIDED, Array, Arrays, Integers, fixed_subset, stratified
from fedsim.errors import UserError
from fedsim.ranges import Count

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION = (
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle boot",
)
ACTIVITIES = ("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "laying")

_TEST_FRACTION, _TEST_USERS = 0.2, 9
_LONGEST = 512  # positions that the sentence encoder has


@needs("cifar10")
def cifar10(*, train_samples: Count | None = None, test_samples: Count | None = None) -> Arrays:
    """CIFAR-10: colour photographs of ten kinds of animals and vehicles, 50,000 and 10,000.

    Args:
        train_samples: a fixed subset of so many training images, stratified by class (default: all).
        test_samples: the same for the test images.

    Returns:
        uint8 [n, 3, 32, 32].
    """
    return _images("cifar10", CIFAR10, train_samples, test_samples)


@needs("fashion-mnist")
def fashion_mnist(*, train_samples: Count | None = None, test_samples: Count | None = None) -> Arrays:
    """Fashion-MNIST: grey pictures of ten kinds of clothes, 60,000 and 10,000.

    Args:
        train_samples: a fixed subset of so many training images, stratified by class (default: all).
        test_samples: the same for the test images.

    Returns:
        uint8 [n, 1, 28, 28].
    """
    return _images("fashion-mnist", FASHION, train_samples, test_samples)


@needs("vader")
def sentiment(
    *,
    tokenizer: str = "minilm",
    max_tokens: Count = 64,
    train_samples: Count | None = None,
    test_samples: Count | None = None,
) -> Arrays:
    """Sentences rated by people as negative or positive, from four domains, which are the natural clients.

    Tweets, snippets of movie reviews, of product reviews and of newspaper editorials (Hutto and Gilbert
    2014): 15,425 sentences whose mean rating, from -4 to 4, is beyond -1 or 1. A fifth of each class of
    each domain is the test set. The domains (groups 0 to 3, in this order) differ in size and class mix.

    Args:
        tokenizer: whose token ids: "minilm", or a folder with the tokenizer.json of another encoder.
        max_tokens: length of every row: longer sentences are cut, shorter ones padded with the tokenizer's
            own padding token.
        train_samples: a fixed subset of so many training sentences, stratified by domain and class.
        test_samples: the same for the test sentences.

    Returns:
        int32 [n, max_tokens].
    """
    if not 3 <= max_tokens <= _LONGEST:
        raise UserError(f"[data] max_tokens must be from 3 to {_LONGEST}, not {max_tokens}")
    sentences = json.loads((assets.path("vader") / "sentences.json").read_text("utf-8"))
    rating, domain = np.array(sentences["rating"]), np.array(sentences["domain"], np.int64)
    clear = np.flatnonzero(np.abs(rating) > 1)
    y, domain = (rating[clear] > 0).astype(np.int64), domain[clear]
    texts = [sentences["text"][position] for position in clear]
    folder = assets.path(tokenizer) if tokenizer in ASSETS else Path(tokenizer).expanduser()
    x, vocabulary, padding = _tokenised(texts, folder, max_tokens)
    cells = 2 * domain + y
    test = stratified(cells, _TEST_FRACTION, seed=0)
    train = np.setdiff1d(np.arange(len(y)), test)
    train = train[fixed_subset(cells[train], train_samples, "train_samples")]
    test = test[fixed_subset(cells[test], test_samples, "test_samples")]
    classes = ("negative", "positive")
    return Arrays(
        x[train],
        y[train],
        x[test],
        y[test],
        classes,
        domain[train],
        vocabulary=vocabulary,
        padding=padding,
    )


def _tokenised(texts: list[str], folder: Path, length: int) -> tuple[Array, int, int]:
    """Token ids int32 [n, length], how many words the tokenizer has, and which of them pads."""
    from tokenizers import Tokenizer

    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"[data] tokenizer: there is no {file}")
    tokenizer = Tokenizer.from_file(str(file))
    pad = _padding(tokenizer, folder)
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=pad)
    # one by one: a batch would start threads, and a process with threads must not be forked
    ids = np.array([tokenizer.encode(text).ids for text in texts], np.int32)
    return ids, tokenizer.get_vocab_size(), pad


def _padding(tokenizer: Tokenizer, folder: Path) -> int:
    """The token id that pads: as the tokenizer says, the files beside it, or the usual names.

    Raises:
        UserError: there is none.
    """
    if tokenizer.padding is not None:
        return int(tokenizer.padding["pad_id"])
    names = ["[PAD]", "<pad>"]
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            said = json.loads((folder / name).read_text("utf-8")).get("pad_token")
            names[:0] = [said["content"] if isinstance(said, dict) else said] if said else []
    found = next((n for n in map(tokenizer.token_to_id, names) if n is not None), None)
    if found is None:
        raise UserError(
            f"[data] tokenizer: {folder / 'tokenizer.json'} has no padding token (looked for "
            f"{', '.join(names)}); name one of its words in tokenizer_config.json beside it: "
            '{"pad_token": "WORD"}'
        )
    return found


#: columns of the census that are numbers, and what they are divided by
_NUMBERS = {"age": 100, "education-num": 16, "capital-gain": 1e5, "capital-loss": 5e3, "hours-per-week": 100}
_CATEGORIES = (
    "workclass",
    "education",
    "marital-status",
    "occupation",
    "relationship",
    "ethnicity",
    "gender",
)


@needs("adult")
def adult(*, train_samples: Count | None = None, test_samples: Count | None = None) -> Arrays:
    """Adult: does a person of the US census of 1994 earn more than 50,000 dollars? 26,049 and 6,512 people.

    The attributes `gender` and `ethnicity` are inputs, too, so that plain training sees them as they are. A
    fifth of each combination of income and gender is the test set. Numbers are divided by fixed scales,
    categories are indicators (a missing value, " ?", is a category).

    Args:
        train_samples: a fixed subset of so many training people, stratified by income and gender.
        test_samples: the same for the test people.

    Returns:
        float32 [n, inputs].
    """
    file = assets.path("adult") / "census.csv"
    with file.open(encoding="utf-8", newline="") as lines:
        rows = [{key: text.strip() for key, text in row.items()} for row in csv.DictReader(lines)]
    columns = [[float(row[name]) / scale for row in rows] for name, scale in _NUMBERS.items()]
    for name in _CATEGORIES:
        values = sorted({row[name] for row in rows})
        columns += [[float(row[name] == value) for row in rows] for value in values]
    x = np.array(columns, np.float32).T
    y = np.array([row["loan"] == ">50K" for row in rows], np.int64)
    found = []
    for name in ("gender", "ethnicity"):
        texts = {"all": np.array([row[name].lower() for row in rows])}
        found.append(coded(texts, name, f"{file}: column '{name}'"))
    z = np.stack([parts["all"] for _, parts in found], 1)
    cells = 2 * z[:, 0].astype(np.int64) + y
    test = stratified(cells, _TEST_FRACTION, seed=0)
    train = np.setdiff1d(np.arange(len(y)), test)
    train = train[fixed_subset(cells[train], train_samples, "train_samples")]
    test = test[fixed_subset(cells[test], test_samples, "test_samples")]
    attributes = tuple(attribute for attribute, _ in found)
    classes = ("at most 50K", "more than 50K")
    whole = Arrays(x, y, x, y, classes, None, attributes, z, z, UNDIVIDED)
    return whole.divided(train, test)


@needs("hapt")
def hapt(
    *,
    test: Literal["later", "users"] = "later",
    train_samples: Count | None = None,
    test_samples: Count | None = None,
) -> Arrays:
    """Six activities of 30 people, from the motion sensors of a phone; the people are the natural clients.

    Who it is (`user`) is an attribute, too. Windows of 128 samples (2.56 s), each half overlapping the one
    before (UCI HAPT, 10,411 windows of the six basic activities). Test and training windows never overlap.

    Args:
        test: "later": the last fifth of each activity of each user; "users": all of nine users, so that 21
            are left for training.
        train_samples: a fixed subset of so many training windows, stratified by user and class.
        test_samples: the same for the test windows.

    Returns:
        float32 [n, 128, 6]: acceleration x, y, z in g, angular velocity x, y, z in rad/s.
    """
    folder = assets.path("hapt")
    x, y, user = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("x", "y", "user"))
    cells = np.asarray(user * len(ACTIVITIES) + y)
    if test == "users":
        unseen = np.random.default_rng(0).permutation(np.unique(user))[:_TEST_USERS]
        tested = np.flatnonzero(np.isin(user, unseen))
        trained = np.flatnonzero(~np.isin(user, unseen))
    else:
        trained, tested = _by_time(cells)
    trained = trained[fixed_subset(cells[trained], train_samples, "train_samples")]
    tested = tested[fixed_subset(cells[tested], test_samples, "test_samples")]
    attributes = (Attribute("user", tuple(f"user {number}" for number in range(int(user.max()) + 1))),)
    z = np.asarray(user, np.float32)[:, None]
    return Arrays(x, y, x, y, ACTIVITIES, user, attributes, z, z, UNDIVIDED).divided(trained, tested)


def _by_time(cells: Integers) -> tuple[Integers, Integers]:
    """Of each cell the first windows and the last fifth, without the window between, which overlaps it."""
    first, last = [], []
    for cell in np.unique(cells):
        members = np.flatnonzero(cells == cell)
        cut = len(members) - max(1, round(_TEST_FRACTION * len(members)))
        first.append(members[: max(cut - 1, 0)])
        last.append(members[cut:])
    return np.sort(np.concatenate(first)), np.sort(np.concatenate(last))


def _images(name: str, classes: tuple[str, ...], train: int | None, test: int | None) -> Arrays:
    folder = assets.path(name)
    parts: dict[str, Any] = {}
    for part, count in (("train", train), ("test", test)):
        x, y = (np.load(folder / f"{part}_{axis}.npy", mmap_mode="r") for axis in "xy")
        chosen = fixed_subset(np.asarray(y), count, f"{part}_samples")
        whole = len(chosen) == len(y)
        parts |= {f"{part}_x": x if whole else x[chosen], f"{part}_y": y if whole else y[chosen]}
    return Arrays(**parts, classes=classes)
