"""A weight -> bytes at the end of the data file: quantized or recalled now, finished and appended by a thread behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar

import numpy as np

from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import ROW_CHUNK_BYTES, Weight
from lowbit.pipeline.checkpoint.safetensors_file import CheckpointWeight
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.onnx_io.entry import write_entry
from lowbit.pipeline.onnx_io.writer import DataFile
from lowbit.pipeline.store.page_cache import forget
from lowbit.pipeline.store.store import Draft, Entry, Store
from lowbit.pipeline.store.weight_keys import HashedWeight, SourceDigests, weight_key

P = ParamSpec("P")
T = TypeVar("T")


class Appender:
    """Appends weights to a data file in the order of its calls, which return before the bytes are there.

    Args:
        forgetful: whether entries are driven out of the page cache once they are appended.

    Attributes:
        entries: of the quantized weights that are appended, in their order.
        recalled: how many quantized weights were there already.
    """

    def __init__(self, sources: SourceDigests, store: Store, data: DataFile, forgetful: bool) -> None:
        self.sources, self.store, self.data, self.forgetful = sources, store, data, forgetful
        self.entries: dict[QuantizedWeight, Entry] = {}
        self.recalled = 0
        self._behind = ThreadPoolExecutor(1)
        self._unfinished: deque[Future[Any]] = deque()
        self._being_made: dict[str, Future[Entry]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._behind.shutdown()

    def wait(self, count: int) -> None:
        """Wait until at most `count` weights are unfinished; raises what went wrong with one."""
        while len(self._unfinished) > count:
            self._unfinished.popleft().result()

    def copy(self, name: str, weight: Weight) -> None:
        """Append a weight that stays as it is."""
        self._later(self._copy, name, weight)

    def recall(self, weight: QuantizedWeight, entry: Entry) -> None:
        """Append a quantized weight whose entry is there."""
        self.recalled += 1
        self._later(self._append, weight, entry)

    def quantize(self, weight: QuantizedWeight) -> None:
        """Append a quantized weight whose entry is perhaps there, or just being made for an equal one; else make it now."""
        if self.sources.known(weight.source) is None and isinstance(weight.source, CheckpointWeight):
            # never read before: read once, quantized and hashed together, its key known afterwards
            hashed = HashedWeight(weight.source)
            draft = self.store.begin(partial(write_entry, replace(weight, source=hashed)))
            self._finish_later(weight, weight_key(weight, self.sources.remember(hashed)), draft)
            return
        key = weight_key(weight, self.sources.of(weight.source))
        entry = self._being_made[key].result() if key in self._being_made else self.store.get(key)
        if entry is None:
            self._finish_later(weight, key, self.store.begin(partial(write_entry, weight)))
        else:
            self.recall(weight, entry)

    def _later(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        future = self._behind.submit(function, *args, **kwargs)
        self._unfinished.append(future)
        return future

    def _finish_later(self, weight: QuantizedWeight, key: str, draft: Draft) -> None:
        self._being_made[key] = self._later(self._finish, weight, key, draft)

    def _finish(self, weight: QuantizedWeight, key: str, draft: Draft) -> Entry:
        entry = self.store.finish(key, draft)
        self._append(weight, entry)
        return entry

    def _append(self, weight: QuantizedWeight, entry: Entry) -> None:
        self.entries[weight] = entry
        for name, part in weight.parts.items():
            self.data.append((entry.folder, name), part.nbytes, _bytes_of(entry.file(name)))
            if self.forgetful:
                forget(entry.file(name))

    def _copy(self, name: str, weight: Weight) -> None:
        hashed = HashedWeight(weight)
        self.data.append(weight, weight.nbytes, _finite_bytes(name, hashed))
        self.sources.remember(hashed)


def _bytes_of(file: Path) -> Iterator[memoryview]:
    with file.open("rb", buffering=0) as stream:
        while chunk := stream.read(ROW_CHUNK_BYTES):
            yield memoryview(chunk)


def _finite_bytes(name: str, weight: Weight) -> Iterator[memoryview]:
    for start, rows in weight.chunks():
        if not np.isfinite(rows.astype(np.float32)).all():
            raise PipelineError(f"'{name}': a weight from row {start} on is NaN or infinite; the checkpoint is damaged.")
        yield np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
