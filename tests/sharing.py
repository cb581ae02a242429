"""What the workers of one session have in common: made by the first that asks, found by all others."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def once(target: Path, make: Callable[[Path], object]) -> Path:
    """The file or folder `target`, made by `make` unless another test, here or in another worker, has made it before."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if not target.exists():
            draft = target.with_name(f".{target.name}")
            shutil.rmtree(draft, ignore_errors=True)  # of a maker that failed
            make(draft)
            draft.rename(target)
    return target
