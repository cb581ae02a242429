"""A graph's weights -> the data file: one at a time, quantized once and recalled ever after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from lowbit.passes.quant.quantized_weight import Part, QuantizedWeight
from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.checkpoint.safetensors_file import CheckpointWeight
from lowbit.pipeline.onnx_io.appender import Appender
from lowbit.pipeline.onnx_io.writer import DataFile
from lowbit.pipeline.store.page_cache import forget, will_need
from lowbit.pipeline.store.store import Entry, Store
from lowbit.pipeline.store.weight_keys import SourceDigests

AHEAD = 2
"""Weights that the disk is asked for before they are read."""
UNFINISHED = 16
"""Written weights that may wait to be synced: they are on the disk's way already and take no memory here."""


@dataclass
class Streamed:
    """What became of the weights of a graph.

    Attributes:
        places: offset and length in the data file, in bytes, by tensor name.
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
    """Fill `data` with `weights`, one at a time, quantized ones made or recalled.

    While rows are quantized, the next ones are read and hashed, the weights after them come from the disk, and the weight
    before is hashed, synced, renamed and appended: the disk and the cores work, and a few megabytes are in memory.

    Args:
        weights: by tensor name.
        progress: gets the bytes that were read and those to be read.
        ready: entries that were made already, in a way of their own.
    """
    # each weight once: a quantized one is several tensors
    jobs = list({weight.of if isinstance(weight, Part) else weight: name for name, weight in weights.items()}.items())
    read = [job.source if isinstance(job, QuantizedWeight) else job for job, _ in jobs]
    total, done = sum(source.nbytes for source in read), 0
    # what will not stay in the page cache until it is read again only drives out what would
    forgetful = 2 * total > psutil.virtual_memory().available
    with Appender(sources, store, data, forgetful) as appender:
        for number, (job, name) in enumerate(jobs):
            for source in read[number + 1 : number + 1 + AHEAD]:
                _advise(will_need, source)
            if not isinstance(job, QuantizedWeight):
                appender.copy(name, job)
            elif job in ready:
                appender.recall(job, ready[job])
            else:
                appender.quantize(job)
            if forgetful and number:
                _advise(forget, read[number - 1])
            appender.wait(UNFINISHED)
            done += read[number].nbytes
            progress(done, total)
        appender.wait(0)
    entries = appender.entries
    contents = {name: (entries[w.of].folder, w.part) if isinstance(w, Part) else w for name, w in weights.items()}
    return Streamed({name: data.places[content] for name, content in contents.items()}, entries, appender.recalled)


def _advise(hint: Callable[[Path, int, int], None], source: Weight) -> None:
    if isinstance(source, CheckpointWeight):
        hint(source.file, source.offset, source.nbytes)
