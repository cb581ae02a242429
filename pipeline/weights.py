"""Weights on their way from the checkpoint to the data file: one at a time, quantized once and recalled ever after."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from passes._channel_scales import ScaledWeight
from passes._quantized import Chunk, Part, QuantizedWeight
from passes._weights import ROW_CHUNK_BYTES, SlicedWeight, TransposedWeight, Weight
from pipeline.checkpoint import Checkpoint, CheckpointWeight, stat_signature
from pipeline.errors import PipelineError
from pipeline.onnx_file import DataFile
from pipeline.page_cache import forget, will_need
from pipeline.store import Draft, Entry, Store, digest, source_digest, versions

LIBRARIES = ("numba", "numpy")
UNFINISHED = 16
"""Written weights that may wait to be synced: they are on the disk's way already and take no memory here."""


@dataclass(frozen=True)
class SourceDigests:
    """SHA-256 of checkpoint tensors, remembered by file signature so that each is read for it once."""

    store: Store

    def of(self, weight: Weight) -> str:
        """SHA-256 of the bytes of a weight, with its shape and dtype."""
        if isinstance(weight, TransposedWeight):
            return digest("transposed", self.of(weight.source))
        if isinstance(weight, SlicedWeight):
            return digest("rows", self.of(weight.source), weight.start, weight.shape[0])
        if isinstance(weight, ScaledWeight):
            return digest("scaled", self.of(weight.source), [None if one is None else one.tolist() for one in weight.scales])
        if (known := self.known(weight)) is not None:
            return known
        hashed = HashedWeight(weight)
        for _ in hashed.chunks():
            pass
        return self.remember(hashed)

    def known(self, weight: Weight) -> str | None:
        """The digest if it is known without reading the weight."""
        if isinstance(weight, TransposedWeight):
            inner = self.known(weight.source)
            return digest("transposed", inner) if inner else None
        if isinstance(weight, SlicedWeight):
            inner = self.known(weight.source)
            return digest("rows", inner, weight.start, weight.shape[0]) if inner else None
        if not isinstance(weight, CheckpointWeight) or not (path := self._path(weight)).exists():
            return None
        return path.read_text("ascii")

    def _path(self, weight: CheckpointWeight) -> Path:
        place = digest(str(weight.file), stat_signature(weight.file), weight.offset, weight.shape, weight.onnx_dtype)
        return self.store.root / "sources" / place[:2] / place

    def remember(self, read: HashedWeight) -> str:
        """The digest of a weight that was read to its end, kept if it is the checkpoint's."""
        found = read.sha.hexdigest()
        if isinstance(read.source, CheckpointWeight):
            path = self._path(read.source)
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_suffix(f".{threading.get_ident()}.tmp")
            temporary.write_text(found, "ascii")
            temporary.rename(path)
        return found


class HashedWeight(Weight):
    """A weight that is hashed while it is read for any purpose; `sha` is complete when `chunks` has ended."""

    def __init__(self, source: Weight) -> None:
        super().__init__(source.shape, source.onnx_dtype)
        self.source = source
        self.sha = hashlib.sha256(json.dumps([source.shape, source.onnx_dtype]).encode())

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        """The chunks of the source; another thread hashes while the next one is read."""
        with ThreadPoolExecutor(1) as hasher:
            before: Future[None] = hasher.submit(self.sha.update, b"")
            for start, rows in self.source.chunks():
                before.result()
                before = hasher.submit(self.sha.update, np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data)
                yield start, rows


def weight_key(weight: QuantizedWeight, source: str) -> str:
    """The key of a quantized weight, from the digest of its source: what it is, not what it is called."""
    return digest("quantized weight", source, *how_quantized(weight), source_digest("passes._quantized"), versions(LIBRARIES))


def shards(checkpoint: Checkpoint, sources: SourceDigests) -> dict[str, dict[str, str]]:
    """SHA-256 of every tensor of a checkpoint, by file and name."""
    found: dict[str, dict[str, str]] = {}
    for name, weight in sorted(checkpoint.weights.items()):
        found.setdefault(weight.file.name, {})[name] = sources.of(weight)
    return found


def model_digest(checkpoint: Checkpoint, sources: SourceDigests) -> str:
    """SHA-256 over the configuration and every tensor of a checkpoint, wherever it lies."""
    tensors = {name: sha for shard in shards(checkpoint, sources).values() for name, sha in shard.items()}
    return digest(checkpoint.config, tensors)


def how_quantized(weight: QuantizedWeight) -> tuple[Any, ...]:
    """What keys hold of a weight beside its source: form, method, options, and the code of the method."""
    method = weight.method
    options = [weight.method_name, method.model_dump(mode="json")]
    return list(astuple(weight.form)), options, source_digest(type(method).__module__)


def entry_of(weight: QuantizedWeight, sources: SourceDigests, store: Store) -> Entry:
    """The entry of a weight that needs no look at its inputs, made now if it is not there."""
    key = weight_key(weight, sources.of(weight.source))
    return store.get(key) or store.put(key, partial(write_entry, weight))


@dataclass
class Streamed:
    """What became of the weights of a graph.

    Attributes:
        places: offset and length in the data file, by tensor name.
        entries: of each quantized weight, in the order of the file.
        recalled: how many of them were there already.
    """

    places: dict[str, tuple[int, int]]
    entries: dict[QuantizedWeight, Entry]
    recalled: int


def stream_weights(
    weights: dict[str, Weight],
    sources: SourceDigests,
    store: Store,
    data: DataFile,
    progress: Callable[[int, int], None],
    ready: dict[QuantizedWeight, Entry],
) -> Streamed:
    """Fill `data` with `weights`, one at a time, quantized ones made or recalled; `progress` gets bytes read and to be read.

    Those in `ready` are made already, in their own way.

    While rows are quantized, the next ones are read and hashed, the weights after them come from the disk, and the weight
    before is hashed, synced, renamed and appended: the disk and the cores work, and a few megabytes are in memory.
    Files of an entry: `codes`, `scales`, `zero_points` or `offsets`, raw little-endian bytes. Facts: `mse` over all weights.
    """
    jobs = list({weight.of if isinstance(weight, Part) else weight: name for name, weight in weights.items()}.items())
    entries: dict[QuantizedWeight, Entry] = {}
    sizes = [job.source.nbytes if isinstance(job, QuantizedWeight) else job.nbytes for job, _ in jobs]
    recalled = 0
    unfinished: deque[Future[Any]] = deque()
    making: dict[str, Future[Entry]] = {}

    # what will not stay in the page cache until it is read again only drives out what would
    forgetful = 2 * sum(sizes) > psutil.virtual_memory().available

    def keep(weight: QuantizedWeight, made: Entry | tuple[str, Draft]) -> Entry:
        entry = entries[weight] = made if isinstance(made, Entry) else store.finish(*made)
        for name, part in weight.parts.items():
            data.append((entry.folder, name), part.nbytes, _pieces(entry.file(name)))
            if forgetful:
                forget(entry.file(name))
        return entry

    with ThreadPoolExecutor(1) as behind:
        for number, (job, name) in enumerate(jobs):
            for following, _ in jobs[number + 1 : number + 3]:
                _advise(will_need, following)
            if isinstance(job, QuantizedWeight):
                made = ready.get(job) or _make(job, sources, store, making)
                recalled += isinstance(made, Entry)
                unfinished.append(kept := behind.submit(keep, job, made))
                if not isinstance(made, Entry):
                    making[made[0]] = kept
            else:
                unfinished.append(behind.submit(_copy, name, job, sources, data))
            if forgetful and number:
                _advise(forget, jobs[number - 1][0])
            if len(unfinished) > UNFINISHED:
                unfinished.popleft().result()
            progress(sum(sizes[: number + 1]), sum(sizes))
        for future in unfinished:
            future.result()
    contents = {name: (entries[w.of].folder, w.part) if isinstance(w, Part) else w for name, w in weights.items()}
    return Streamed({name: data.places[content] for name, content in contents.items()}, entries, recalled)


def _advise(hint: Callable[[Path, int, int], None], job: Weight | QuantizedWeight) -> None:
    source = job.source if isinstance(job, QuantizedWeight) else job
    if isinstance(source, CheckpointWeight):
        hint(source.file, source.offset, source.nbytes)


def _make(
    weight: QuantizedWeight, sources: SourceDigests, store: Store, making: dict[str, Future[Entry]]
) -> Entry | tuple[str, Draft]:
    """The entry of a weight, also of one that is just being made, or the draft of a new one with its key.

    A source that was never read before is read once: quantized and hashed together, its key known afterwards.
    """
    if sources.known(weight.source) is None and isinstance(weight.source, CheckpointWeight):
        hashed = HashedWeight(weight.source)
        draft = store.begin(partial(write_entry, replace(weight, source=hashed)))
        return weight_key(weight, sources.remember(hashed)), draft
    key = weight_key(weight, sources.of(weight.source))
    if key in making:
        return making[key].result()
    return store.get(key) or (key, store.begin(partial(write_entry, weight)))


def _copy(name: str, weight: Weight, sources: SourceDigests, data: DataFile) -> None:
    """Append a weight that stays as it is."""
    hashed = HashedWeight(weight)

    def finite() -> Iterator[memoryview]:
        for start, rows in hashed.chunks():
            if not np.isfinite(rows.astype(np.float32)).all():
                raise PipelineError(f"'{name}': a weight from row {start} on is NaN or infinite; the checkpoint is damaged.")
            yield np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data

    data.append(weight, weight.nbytes, finite())
    sources.remember(hashed)


def _pieces(file: Path) -> Iterator[memoryview]:
    with file.open("rb", buffering=0) as stream:
        while piece := stream.read(ROW_CHUNK_BYTES):
            yield memoryview(piece)


def write_entry(weight: QuantizedWeight, folder: Path) -> dict[str, Any]:
    """Quantize a weight into files of a folder, one for each of its parts; returns its facts."""
    return write_chunks(weight, weight.chunks(), folder)


def write_chunks(weight: QuantizedWeight, chunks: Iterable[Chunk], folder: Path) -> dict[str, Any]:
    """Write a quantized weight, given from the first row to the last, as `write_entry` does."""
    total = square = 0.0
    files = {name: (folder / name).open("wb") for name in weight.parts}
    try:
        for chunk in chunks:
            for name, stream in files.items():
                stream.write(memoryview(getattr(chunk, name)).cast("B"))
            total += chunk.squared_error
            square += chunk.square
    finally:
        for stream in files.values():
            stream.close()
    n, k = weight.source.shape
    return {"mse": total / (n * k), "relative_error": math.sqrt(total / max(square, np.finfo(np.float64).tiny))}
