"""What lies in a folder of images: visible files, links followed once, which folder is a split or a class.

photos/cat, photos/dog                        classes
photos/train/cat, photos/test/cat, ...        splits (also val, valid, validation, training, testing)
photos/cat/train, photos/cat/test, ...        the same, the other way round
photos/one-folder/...                         whatever is in the one folder
"""

from __future__ import annotations

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fedsim.errors import UserError, listed, nearest

IMAGE_SUFFIXES = {
    ".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm",
    ".pbm", ".pnm",
}  # fmt: skip
TABLE = "attributes.csv"

#: names of splits, in lower case
_SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
#: what systems and tools leave behind, besides names that begin with a dot
_LEFT_BEHIND = {
    "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "__pycache__", "@eadir", "$recycle.bin",
    "system volume information", "lost+found",
}  # fmt: skip


@dataclass
class Tree:
    """What lies below a folder; paths are as one would type them, not as links resolve.

    Attributes:
        root: the folder.
        files: visible files, with size and time.
        folders: visible folders.
        hidden: names of what was skipped: dot files, `__MACOSX`, `Thumbs.db`, ...
        again: links to folders that are there already.
        dead: links to nothing.
    """

    root: Path
    files: dict[Path, os.stat_result] = field(default_factory=dict)
    folders: set[Path] = field(default_factory=set)
    hidden: list[str] = field(default_factory=list)
    again: list[Path] = field(default_factory=list)
    dead: list[Path] = field(default_factory=list)

    @cached_property
    def images(self) -> list[Path]:
        """Files that are images by their suffix, sorted."""
        return sorted(file for file in self.files if file.suffix.lower() in IMAGE_SUFFIXES)

    @cached_property
    def _full(self) -> set[Path]:
        """Folders with an image somewhere below."""
        return {parent for image in self.images for parent in image.parents}

    @cached_property
    def _children(self) -> dict[Path, list[Path]]:
        children: dict[Path, list[Path]] = {}
        for folder in sorted(self.folders):
            children.setdefault(folder.parent, []).append(folder)
        return children

    def inside(self, folder: Path, *, empty: bool = False) -> list[Path]:
        """Folders directly in a folder, sorted; those without images only if `empty`."""
        return [sub for sub in self._children.get(folder, []) if empty or sub in self._full]

    def direct(self, folders: Iterable[Path]) -> bool:
        """Whether an image lies directly in one of some folders."""
        return not {image.parent for image in self.images}.isdisjoint(folders)

    def stamp(self) -> list[list[object]]:
        """What changes when something is added, removed or replaced."""
        files: list[list[object]] = [
            [str(f), s.st_size, s.st_mtime_ns] for f, s in sorted(self.files.items())
        ]
        return [*files, [str(path) for path in sorted([*self.folders, *self.dead])], [len(self.hidden)]]


def look(root: Path) -> Tree:
    """Everything below a folder. A linked folder counts once, and not at all if it is below `root` anyway.

    Raises:
        UserError: a folder cannot be read.
    """
    tree = Tree(root)
    real = root.resolve()
    seen = {_identity(folder) for folder in (real, *real.parents)}  # a link upwards would never end
    links: list[Path] = []
    _enter(root, tree, seen, links)
    while links:  # more of them turn up in linked folders
        links.sort(key=lambda link: (len(link.parts), link))  # of two links to a folder the outer one counts
        link = links.pop(0)
        if _identity(link) in seen:
            tree.again.append(link)
            continue
        seen.add(_identity(link))
        tree.folders.add(link)
        _enter(link, tree, seen, links)
    return tree


def _enter(folder: Path, tree: Tree, seen: set[tuple[int, int]], links: list[Path]) -> None:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from error
    for name in names:
        path = folder / name
        if name.startswith(".") or name.casefold() in _LEFT_BEHIND:
            tree.hidden.append(name)
            continue
        try:
            status = path.stat()
        except OSError as error:
            if not path.is_symlink():
                said = f"{path}: cannot be read ({error.strerror}); check its permissions"
                raise UserError(said) from error
            tree.dead.append(path)
            continue
        if not path.is_dir():
            tree.files[path] = status
        elif path.is_symlink():
            links.append(path)
        elif _identity(path) not in seen:  # below a linked folder there may be what was seen before
            seen.add(_identity(path))
            tree.folders.add(path)
            _enter(path, tree, seen, links)


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


#: a file and the position of its class
_Image = tuple[Path, int]
#: a folder of one class, and the name of the class
_Folder = tuple[Path, str]


@dataclass(frozen=True)
class Found:
    """Images by split, with the positions of their classes.

    Attributes:
        classes: names, sorted.
        train: files and labels.
        test: files and labels; None: there is no such split.
        notes: what the data card says.
    """

    classes: tuple[str, ...]
    train: list[_Image]
    test: list[_Image] | None
    notes: tuple[str, ...]


def sort_images(tree: Tree) -> Found:
    """Which image belongs to which split and class.

    Raises:
        UserError: a link to nothing, no class folders, no images, or a class that training lacks.
    """
    if tree.dead:
        more = f" ({len(tree.dead)} such links)" if len(tree.dead) > 1 else ""
        raise UserError(
            f"{tree.dead[0]}: a link to what is not there{more}; restore its target, or remove it"
        )
    place, parts, notes = _parts(tree)
    if "train" not in parts:
        raise UserError(f"{place}: images for {' and '.join(parts)}, none to train on; add a folder train")
    tested = "test" if "test" in parts else "val" if "val" in parts else None
    training = parts["train"]
    if tested == "val":
        notes.append("there is no folder test: val is the test set")
    elif "val" in parts:
        training = training + parts["val"]
        notes.append("val joins the training images ([evaluation] validation holds a share of them back)")
    classes = tuple(sorted({name for _, name in training}))
    if not classes:
        raise UserError(f"{place}: no class folders; put the images of each class in a folder of its own")
    train = _labelled(tree, training, classes, place)
    test = _labelled(tree, parts[tested], classes, place) if tested else None
    return Found(classes, train, test, (*notes, *_remarks(tree, train, test)))


def _parts(tree: Tree) -> tuple[Path, dict[str, list[_Folder]], list[str]]:
    """Where the splits or classes are, the class folders by split (without splits: `train`), and notes."""
    place, notes = tree.root, []
    while True:
        folders = tree.inside(place)
        splits = [folder for folder in folders if _split(folder) and tree.inside(folder)]
        if splits and _are_splits(tree, folders, splits):
            notes.append(f"splits: {listed(folder.name for folder in splits)}")
            if others := [folder.name for folder in folders if folder not in splits]:
                why = "no split's name, or no class folders inside"
                notes.append(f"left out beside the splits: {listed(others)} ({why})")
            subs = [(f, sub) for f in splits for sub in tree.inside(f, empty=True)]
            return place, _grouped((_split(f), sub, sub.name) for f, sub in subs), notes
        if len(folders) > 1 and all(map(_split, folders)):
            raise UserError(
                f"{place}: {listed(f.name for f in folders)} are splits, but have no class folders; put "
                "the images of each class in a folder of its own"
            )
        _refuse_half_splits(tree, place, folders, splits)
        below = [sub for folder in folders for sub in tree.inside(folder)]
        deeper = any(tree.inside(sub) for sub in below)
        if below and all(map(_split, below)) and not deeper and not tree.direct(folders):
            notes.append("splits: found in each class folder")
            return place, _grouped((_split(sub), sub, sub.parent.name) for sub in below), notes
        every = tree.inside(place, empty=True)
        if len(every) > 1 or not below or tree.direct([place, *every]):
            return place, _grouped(("train", folder, folder.name) for folder in every), notes
        place = every[0]
        notes.append(f"the class folders are those in {place.relative_to(tree.root)}")


def _are_splits(tree: Tree, folders: list[Path], splits: list[Path]) -> bool:
    """Whether folders named like splits are some: "train" beside "car" and "ship" is a class."""
    if all(map(_split, folders)):
        return True
    names: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for folder in splits:
        names[_split(folder)] |= {sub.name for sub in tree.inside(folder)}
    return not names["train"].isdisjoint(names["val"] | names["test"])


def _refuse_half_splits(tree: Tree, place: Path, folders: list[Path], splits: list[Path]) -> None:
    """Refuse "train" beside "eval" with the same class folders, or beside the classes that it holds."""
    others = [folder for folder in folders if folder not in splits]
    inside = {sub.name for folder in splits for sub in tree.inside(folder)}
    for folder in others:
        if folder.name in inside or not inside.isdisjoint(sub.name for sub in tree.inside(folder)):
            raise UserError(
                f"{place}: {listed(split.name for split in splits)} has class folders like a split, but "
                f"'{folder.name}' beside it is none; splits are named {', '.join(_SPLITS)}: rename or move "
                "one of them"
            )


def _grouped(triples: Iterable[tuple[str, Path, str]]) -> dict[str, list[_Folder]]:
    """Class folders by split; the same letters are the same name, however a system stores accents."""
    parts: dict[str, list[_Folder]] = {}
    for part, folder, name in triples:
        parts.setdefault(part, []).append((folder, unicodedata.normalize("NFC", name)))
    return parts or {"train": []}


def _split(folder: Path) -> str:
    """Which split a folder's name says, or ""."""
    return _SPLITS.get(folder.name.casefold(), "")


def _labelled(tree: Tree, folders: list[_Folder], classes: tuple[str, ...], place: Path) -> list[_Image]:
    """The images of class folders with their labels: class by class, each sorted."""
    code = {name: number for number, name in enumerate(classes)}
    name_of = dict(folders)
    found: list[list[Path]] = [[] for _ in classes]
    for image in tree.images:
        folder = next((parent for parent in image.parents if parent in name_of), None)
        if folder is None:
            continue
        if name_of[folder] not in code:
            raise UserError(
                f"{folder}: class '{name_of[folder]}' has no folder among the training images: "
                f"{nearest(name_of[folder], classes)}"
            )
        found[code[name_of[folder]]].append(image)
    if not any(found):
        known = ", ".join(sorted(IMAGE_SUFFIXES))
        where = folders[0][0].parent if folders else place
        raise UserError(f"{where}: no image files ({known}) in its class folders")
    return [(image, label) for label, images in enumerate(found) for image in images]


def _remarks(tree: Tree, train: list[_Image], test: list[_Image] | None) -> list[str]:
    """What was skipped."""
    used = {image for image, _ in (*train, *(test or []))}
    unused = [image for image in tree.images if image not in used]
    others = [f for f in tree.files if f.suffix.lower() not in IMAGE_SUFFIXES and f != tree.root / TABLE]
    kinds = Counter(file.suffix.lower() or "no suffix" for file in others)
    skipped: list[tuple[Sequence[object], str, Iterable[str]]] = [
        (unused, "images outside class folders", (str(f.relative_to(tree.root)) for f in unused)),
        (others, "files that are no images", kinds),
        (tree.hidden, "hidden files or folders", dict.fromkeys(tree.hidden)),
        (tree.again, "links to folders that are read anyway", (f.name for f in tree.again)),
    ]
    return [f"skipped {kind}: {len(what)} ({listed(names)})" for what, kind, names in skipped if what]
