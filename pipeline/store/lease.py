"""Folders in the making: whoever makes one holds its lease, and what nobody holds any more was abandoned."""

from __future__ import annotations

import shutil
import uuid
from pathlib import Path

from filelock import FileLock, Timeout

from lowbit.pipeline.store.durable import make_folder

PREFIX, LOCK = ".tmp-", ".lock"


class Lease:
    """A new folder below `root` that no sweep removes as long as this process lives.

    The lease is a lock of the operating system on a file beside the folder. It ends with its process, however that ends, and it
    holds between containers and between hosts that share `root`, where a process number would mean nothing.
    """

    def __init__(self, root: Path) -> None:
        make_folder(root)
        self.folder = root / f"{PREFIX}{uuid.uuid4().hex}"
        self._lock = _lock_of(self.folder)
        self._lock.acquire()
        try:
            self.folder.mkdir()
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """Remove the folder if it is still there, and give the lease back."""
        shutil.rmtree(self.folder, ignore_errors=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


def in_use(root: Path) -> bool:
    """Whether anybody holds the lease of a folder below `root`."""
    for file in root.glob(f"{PREFIX}*{LOCK}"):
        try:
            with FileLock(file).acquire(timeout=0):
                continue
        except Timeout:
            return True
    return False


def sweep(root: Path) -> None:
    """Remove the folders, and locks of folders, below `root` whose makers are gone."""
    for name in {path.name.removesuffix(LOCK) for path in root.glob(f"{PREFIX}*")}:
        folder = root / name
        lock = _lock_of(folder)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError, NotImplementedError):  # held, or a file system without locks: nobody can tell
            continue
        shutil.rmtree(folder, ignore_errors=True)
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _lock_of(folder: Path) -> FileLock:
    return FileLock(folder.with_name(f"{folder.name}{LOCK}"), thread_local=False)
