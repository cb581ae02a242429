"""The folder of a result: locked, filled aside, then published at once."""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.targets import find_options, target_names
from lowbit.pipeline.report.manifest import MANIFEST, read_manifest
from lowbit.pipeline.store.durable import sync

LOCK = ".lock"
"""In every folder that a run works in, held while it does; says by which process."""
RESOLVED = "resolved.yaml"
"""The recipe with bits in place of a budget, beside the one that was asked for; there only if there was a budget."""


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the folder's lock, or say who does."""
    file = target / LOCK
    try:
        lock = FileLock(file).acquire(timeout=0)
    except Timeout:
        raise PipelineError(
            f"{target}: another run (process {file.read_text('utf-8').strip()}) is working here; wait for it, or stop it."
        ) from None
    with lock:
        file.write_text(f"{os.getpid()} on {platform.node() or 'this host'}", "utf-8")
        yield


@contextmanager
def work_folder(target: Path) -> Iterator[Path]:
    """A folder for results in the making; what an interrupted run left is removed first."""
    for old in target.glob(".work-*"):
        shutil.rmtree(old, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=target))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(work: Path, target: Path) -> None:
    """Put finished results in place of the old ones; the manifest goes first and comes last."""
    engines = {find_options(name).folder for name in target_names()} | _engines_of(target)
    stale = [item for item in target.iterdir() if item.name in engines | {"onnx", RESOLVED}]
    for path in (*work.rglob("*"), work):
        sync(path)
    (target / MANIFEST).unlink(missing_ok=True)
    sync(target)
    for item in stale:
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink()
    for item in sorted(work.iterdir(), key=lambda path: path.name == MANIFEST):
        if item.name == MANIFEST:
            sync(target)  # whoever sees it sees all that it lists, though the power failed
        item.replace(target / item.name)
    sync(target)


def _engines_of(target: Path) -> set[str]:
    """The engines' folders of a finished result: those of plug-ins are known from nowhere else."""
    try:
        return set(read_manifest(target).hand_offs)
    except PipelineError:
        return set()
