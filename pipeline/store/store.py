"""Results by content: a key is the digest of everything that a result depends on.

An entry is a folder `<key>/` with files and `entry.json`: facts about the result, SHA-256 of each file, and a seal over both,
signed where a team has a key.
It is written under a temporary name, synced and renamed, so a half-written one is never found; it is verified whenever it is
recalled, so a damaged one is made anew.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.pipeline.checkpoint.files import parse_json
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.store.digests import digest, sha256
from lowbit.pipeline.store.durable import make_folder, sync
from lowbit.pipeline.store.lease import Lease, sweep
from lowbit.pipeline.store.signature import signature, signed

RECORD = "entry.json"


@dataclass(frozen=True)
class Entry:
    """A finished result: its folder and the facts that were noted with it."""

    folder: Path
    facts: dict[str, Any]
    files: dict[str, str]

    def file(self, name: str) -> Path:
        return self.folder / name


@dataclass(frozen=True)
class Draft:
    """A result that is written but has no key yet."""

    folder: Path
    facts: dict[str, Any]
    lease: Lease


@dataclass(frozen=True)
class Store:
    """All results ever made under one root folder."""

    root: Path

    @property
    def local(self) -> Store:
        """The part of the store that this machine has for itself: for what others have no use for."""
        return self

    def get(self, key: str) -> Entry | None:
        """The entry of `key` if it is whole; a damaged one is removed."""
        return self._whole(key)

    def _whole(self, key: str) -> Entry | None:
        """The entry of `key` that lies here, if it is whole; a damaged one is removed."""
        folder = self.root / key[:2] / key
        if not folder.exists():  # asked first: a run beside this one may rename it into its place at any moment
            return None
        try:
            return _verified(key, folder)
        except (ValueError, KeyError, TypeError, AttributeError, OSError):
            pass
        shutil.rmtree(folder, ignore_errors=True)
        return None

    def remove(self, entry: Entry) -> None:
        """Remove an entry that nothing will ask for again."""
        shutil.rmtree(entry.folder, ignore_errors=True)

    def has(self, key: str) -> bool:
        """Whether there is an entry of `key`, unverified: for plans."""
        return (self.root / key[:2] / key / RECORD).exists()

    def sweep(self) -> None:
        """Remove what killed runs left half-written; that of running ones, here and elsewhere, stays."""
        sweep(self.root)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for what need not outlive the run."""
        with writing(self.root):
            lease = Lease(self.root)
            try:
                yield lease.folder
            finally:
                lease.end()

    def put(self, key: str, write: Callable[[Path], dict[str, Any]]) -> Entry:
        """Make the entry of `key`: `write` fills a folder and returns the facts."""
        return self.finish(key, self.begin(write))

    def begin(self, write: Callable[[Path], dict[str, Any]]) -> Draft:
        """The first half of `put`: the files are there, under a temporary name."""
        with writing(self.root):
            lease = Lease(self.root)
            with _ended_on_failure(lease):
                return Draft(lease.folder, write(lease.folder), lease)

    def finish(self, key: str, draft: Draft) -> Entry:
        """The second half of `put`: hashed, synced and renamed. Another thread may do it."""
        work = draft.folder
        with writing(self.root), _ended_on_failure(draft.lease):
            files = {p.name: sha256(p) for p in sorted(work.iterdir())}
            record = {"key": key, "facts": draft.facts, "files": files}
            (work / RECORD).write_text(json.dumps(record | _closing(record), indent=1, sort_keys=True), "utf-8")
            folder = self._settle(key, work)
            draft.lease.end()
        return Entry(folder, draft.facts, files)

    def _settle(self, key: str, work: Path) -> Path:
        """Let a finished folder be the entry of `key`, unless a whole one lies there; where that is."""
        target = self.root / key[:2] / key
        for path in [*work.iterdir(), work]:
            sync(path)
        make_folder(target.parent)
        if self._whole(key) is None:  # else made before, or by another run that was faster; equal by construction
            try:
                work.rename(target)
            except OSError:
                if self._whole(key) is None:  # else another run was faster just now
                    raise
            sync(target.parent)
        return target


def _closing(record: dict[str, Any]) -> dict[str, str]:
    """What closes a record: its seal and, if the team has a key, the signature of that."""
    seal = digest(record)
    signed_as = signature(seal)
    return {"seal": seal} if signed_as is None else {"seal": seal, "signature": signed_as}


def _verified(key: str, folder: Path) -> Entry:
    """The entry in `folder`.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError: its record, its files or their number are not what was sealed,
            or nobody with the team's key did it.
    """
    record = parse_json((folder / RECORD).read_text("utf-8"))
    seal, signed_as = record.pop("seal"), record.pop("signature", None)
    files = {path.name for path in folder.iterdir() if path.is_file() and not path.is_symlink()} - {RECORD}
    if record["key"] != key or seal != digest(record) or files != set(record["files"]):
        raise ValueError(f"{folder}: the record is not the one that was sealed")
    if not signed(seal, signed_as):
        raise ValueError(f"{folder}: not signed by the key of the team")
    if any(sha256(folder / name) != want for name, want in record["files"].items()):
        raise ValueError(f"{folder}: a file is not the one that was sealed")
    return Entry(folder, record["facts"], record["files"])


@contextmanager
def _ended_on_failure(lease: Lease) -> Iterator[None]:
    try:
        yield
    except BaseException:
        lease.end()
        raise


class writing:  # noqa: N801  (reads as a statement: `with writing(folder):`)
    """Turns a full disk, a folder without permission, or a file in a folder's place into a sentence."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PipelineError(
                f"{self.folder}: the disk is full. What was finished is kept; free some space and run again to go on."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY):
            raise PipelineError(f"{error.filename or self.folder}: cannot write here ({error.strerror}).") from error
