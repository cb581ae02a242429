"""Weights on their way from the checkpoint to the data file: one at a time, quantized once and recalled ever after."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from lowbit.passes.quant.quantized_weight import Chunk, Part, QuantizedWeight
from lowbit.passes.quant.weights import ROW_CHUNK_BYTES, Weight
from lowbit.pipeline.checkpoint.huggingface import CheckpointWeight
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.onnx_io.writer import DataFile
from lowbit.pipeline.store.page_cache import forget, will_need
from lowbit.pipeline.store.store import Draft, Entry, Store
from lowbit.pipeline.store.weight_keys import HashedWeight, SourceDigests, weight_key

UNFINISHED = 16
"""Written weights that may wait to be synced: they are on the disk's way already and take no memory here."""


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
