"""Hints to the system's page cache, where it takes any (posix_fadvise): they change speed, never what is read."""

from __future__ import annotations

import os
from pathlib import Path


def will_need(file: Path, offset: int = 0, length: int = 0) -> None:
    """Start reading a range in the background; length 0 is up to the end."""
    _advise(file, offset, length, "POSIX_FADV_WILLNEED")


def forget(file: Path, offset: int = 0, length: int = 0) -> None:
    """Give up the pages of a range that are on the disk; length 0 is up to the end."""
    _advise(file, offset, length, "POSIX_FADV_DONTNEED")


def _advise(file: Path, offset: int, length: int, advice: str) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    handle = os.open(file, os.O_RDONLY)
    try:
        os.posix_fadvise(handle, offset, length, getattr(os, advice))
    finally:
        os.close(handle)
