"""Version and digest of the code: server and clients must run the same."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path


def fedsim_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("fedsim")
    except PackageNotFoundError:
        return "0+unknown"


@cache
def code_digest() -> str:
    """Version and sha256 (12 hex digits) over the Python sources of fedsim, strategies and clients."""
    total = hashlib.sha256()
    for package in ("clients", "fedsim", "strategies"):
        spec = find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in sorted(Path(folder).rglob("*.py")):
                total.update(f"{package}/{path.relative_to(folder)}\0".encode())
                total.update(path.read_bytes())
    return f"{fedsim_version()}+{total.hexdigest()[:12]}"
