"""`lowbit clean`: remove results and what is kept of finished steps, but never under a run that works with them."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.run.workspace import LOCK, locked
from lowbit.pipeline.store.lease import in_use
from lowbit.pipeline.store.store import writing

GROUPS = ("sweep", "frontier")
"""Folders of results that belong together, beside the other results."""
FILES = ("compare.html", "lowbit-error-*.txt")


def clean_build(build: Path) -> list[str]:
    """Remove what lowbit made in a build folder, and the folder if that was all; returns the names of what is left.

    Raises:
        PipelineError: a run is working there.
    """
    with ExitStack() as locks, writing(build):
        for file in sorted(file for depth in range(1, 4) for file in build.glob("*/" * depth + LOCK)):
            locks.enter_context(locked(file.parent))
        if in_use(build / ".store"):
            raise PipelineError(f"{build / '.store'}: another command is writing here; wait for it, or stop it.")
        for place in (build, *(build / group for group in GROUPS)):
            for file in place.glob(f"*/{LOCK}"):
                _remove(file.parent)
        for group in GROUPS:
            _remove_empty(build / group)
        for path in (build / ".store", *(path for pattern in FILES for path in build.glob(pattern))):
            _remove(path)
    _remove_empty(build)
    return sorted(path.name for path in build.iterdir()) if build.is_dir() else []


def _remove(path: Path) -> None:
    """A link goes, and what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty(folder: Path) -> None:
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
