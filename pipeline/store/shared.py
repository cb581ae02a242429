"""A store that several machines share: what one has made, the others fetch."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import fsspec

from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.store.durable import make_folder
from lowbit.pipeline.store.store import RECORD, Draft, Entry, Store

READ_ONLY = "ro:"
"""Before the place of a store: it is read and never written to."""


@dataclass(frozen=True)
class SharedStore(Store):
    """Entries are kept here and at `url`, whatever fsspec knows: `s3://bucket/path`, `ssh://host/path`, `file:///mnt/path`.

    An entry is sent with its record last, so that nobody sees half of one, and verified when it is fetched as any other. What a
    run that was killed did not send to its end is sent when it is recalled.

    Attributes:
        read_only: whether entries are only fetched; what is made here stays here, and what is refused is not asked for again.
    """

    url: str
    read_only: bool = False

    @property
    def local(self) -> Store:
        return Store(self.root)

    def get(self, key: str) -> Entry | None:
        """The entry of `key`, fetched if only others have it."""
        if (entry := super().get(key)) is not None:
            if self._unsent(key).exists():
                self._send(entry)
            return entry
        if not self._there(key):
            return None
        with self.scratch() as work:
            try:
                for name in self._fs.ls(self._place(key), detail=False):
                    self._fs.get_file(name, str(work / Path(name).name))
            except FileNotFoundError:  # removed meanwhile by a machine that found it damaged
                return None
            self._settle(key, work)
        if (entry := super().get(key)) is None:  # damaged there, or on the way: made anew, and sent again
            self._remove_there(key)
        return entry

    def has(self, key: str) -> bool:
        return super().has(key) or self._there(key)

    def remove(self, entry: Entry) -> None:
        super().remove(entry)
        if self._there(entry.folder.name):
            self._remove_there(entry.folder.name)

    def finish(self, key: str, draft: Draft) -> Entry:
        """Keep the entry here, and send it."""
        if self.read_only:
            return super().finish(key, draft)
        make_folder(self._unsent(key).parent)
        self._unsent(key).touch()
        entry = super().finish(key, draft)
        self._send(entry)
        return entry

    def _send(self, entry: Entry) -> None:
        key = entry.folder.name
        if not self._there(key):
            self._fs.makedirs(self._place(key), exist_ok=True)
            try:
                for file in sorted(entry.folder.iterdir(), key=lambda path: path.name == RECORD):
                    self._fs.put_file(str(file), f"{self._place(key)}/{file.name}")
            except FileNotFoundError:  # removed meanwhile by a machine that found it damaged: sent when it is recalled
                return
        self._unsent(key).unlink(missing_ok=True)

    def _there(self, key: str) -> bool:
        return not self._refused(key).exists() and bool(self._fs.exists(f"{self._place(key)}/{RECORD}"))

    def _remove_there(self, key: str) -> None:
        if not self.read_only:
            with contextlib.suppress(FileNotFoundError):  # another machine was faster
                self._fs.rm(self._place(key), recursive=True)
            return
        self._refused(key).parent.mkdir(parents=True, exist_ok=True)
        self._refused(key).touch()

    def _refused(self, key: str) -> Path:
        """A file here that says not to take an entry from where nothing can be removed."""
        return self.root / "refused" / key

    def _unsent(self, key: str) -> Path:
        """A file here that says that an entry was made and perhaps not sent."""
        return self.root / "unsent" / key

    def _place(self, key: str) -> str:
        return f"{self._at[1]}/{key[:2]}/{key}"

    @property
    def _fs(self) -> Any:
        return self._at[0]

    @cached_property
    def _at(self) -> tuple[Any, str]:
        try:
            files, path = fsspec.core.url_to_fs(self.url)
        except (ValueError, ImportError) as error:  # no such protocol, or its package is not installed
            raise PipelineError(f"--store {self.url}: {error}") from error
        return files, path.rstrip("/")


def store_at(build: Path, place: str | None) -> Store:
    """The store of a build folder: within it, in another folder, or shared at a URL; `ro:` before either only reads there."""
    if place is None:
        return Store(build / ".store")
    where = place.removeprefix(READ_ONLY)
    if where != place:
        return SharedStore(build / ".store", where if "://" in where else str(Path(where).resolve()), read_only=True)
    return SharedStore(build / ".store", place) if "://" in place else Store(Path(place))
