"""Compiled kernels in the user's own cache: compiled once per machine, for every clone, environment and version of the sources.

numba keeps machine code beside a kernel's file, so each checkout compiled all of them anew, a minute's work. It also looks at
that one file alone: here the key covers the kernels that are inlined from others. Importing this module is what turns it on;
it must come before the kernels of a module are made.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Self

from numba.core.caching import CacheImpl, UserWideCacheLocator

PACKAGE = Path(__file__).parents[2]
SHARED = (PACKAGE / "passes" / "quant", PACKAGE / "passes" / "methods")
"""Where kernels that others inline lie, besides their own folder and the one above."""


class KernelLocator(UserWideCacheLocator):  # type: ignore[misc]
    """numba's question where the machine code of a kernel of this package is kept, answered."""

    def __init__(self, function: Callable[..., Any], file: Path) -> None:
        self.line = function.__code__.co_firstlineno
        self.stamp = sources_digest(file.parent)
        self.folder = cache_folder() / self.stamp

    @classmethod
    def from_function(cls, py_func: Callable[..., Any], py_file: str) -> Self | None:
        """The locator of a kernel; None where it is not ours, or there is no folder that nobody else can write to."""
        file = Path(py_file)
        if not file.is_relative_to(PACKAGE / "passes") and not file.is_relative_to(PACKAGE / "pipeline"):
            return None
        try:
            locator = cls(py_func, file)
            locator.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            trusted = all(map(only_ours, (cache_folder(), locator.folder)))
            return locator if trusted and os.access(locator.folder, os.W_OK) else None
        except OSError:
            return None

    def get_cache_path(self) -> str:
        return str(self.folder)

    def get_source_stamp(self) -> str:
        return self.stamp

    def get_disambiguator(self) -> str:
        return str(self.line)


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/lowbit/kernels`, by default under `~/.cache`."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    return base / "lowbit" / "kernels"


def only_ours(folder: Path) -> bool:
    """Whether a folder is this user's and nobody else may write to it: what lies there is run as it is."""
    status = folder.stat()
    return not hasattr(os, "getuid") or (status.st_uid == os.getuid() and not status.st_mode & 0o022)


@cache
def sources_digest(folder: Path) -> str:
    """SHA-256, in hex, over the names and sources of all modules that a kernel of `folder` may be made of."""
    digest = hashlib.sha256()
    for part in dict.fromkeys((*SHARED, folder.parent, folder)):
        for file in sorted(part.glob("*.py")):
            digest.update(f"{file.relative_to(PACKAGE)}\0".encode() + file.read_bytes() + b"\0")
    return digest.hexdigest()


if KernelLocator not in CacheImpl._locator_classes:
    CacheImpl._locator_classes.insert(0, KernelLocator)
