"""An asset of twelve numbers and a registry of its own, for the tests of fetching."""

from __future__ import annotations

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np

from fedsim.data import assets
from fedsim.data.asset_sources import Archive
from fedsim.data.asset_table import Asset

NUMBERS = np.arange(12, dtype=np.int32).reshape(3, 4)


class Shelf:
    """An asset `numbers` in a folder of its own, and a registry that counts how often it is asked."""

    def __init__(self, root: Path, registry: Path) -> None:
        self.root, self.registry = root, registry
        self.folder = root / "numbers"
        self.kept = root / "archives" / "numbers.zip"
        self.asked = registry / "asked"
        registry.mkdir()
        self.offer(NUMBERS)
        self.good = (registry / "numbers.zip").read_bytes()

    def offer(self, numbers: np.ndarray) -> None:
        buffer = io.BytesIO()
        np.save(buffer, numbers)
        with zipfile.ZipFile(self.registry / "numbers.zip", "w") as archive:
            archive.writestr("numbers.npy", buffer.getvalue())

    def downloads(self) -> int:
        return len(self.asked.read_text()) if self.asked.exists() else 0

    def download(self, archive: Archive, scratch: Path) -> Path:
        with self.asked.open("a") as log:
            log.write("x")
        (scratch / "archive").mkdir()
        return Path(shutil.copy(self.registry / archive.file, scratch / "archive"))

    def asset(self) -> Asset:
        return Asset(
            "twelve numbers",
            "none needed",
            Archive("pip", "numbers", "1.0", "numbers.zip", 1, assets._sha256(self.registry / "numbers.zip")),
            self.read,
            self.pin(),
        )

    def read(self, archive: Path, made: Path) -> None:
        zipfile.ZipFile(archive).extractall(made)

    def pin(self) -> str:
        made = self.registry / "made"
        made.mkdir()
        np.save(made / "numbers.npy", NUMBERS)
        found = assets.content_digest(made)
        shutil.rmtree(made)
        return found

    def seen(self) -> set[str]:
        """What lies in the folder of assets, locks aside."""
        return {entry.name for entry in self.root.iterdir() if entry.suffix != ".lock"}
