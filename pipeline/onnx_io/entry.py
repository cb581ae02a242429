"""A quantized weight -> its entry in the store: `codes`, `scales`, `zero_points` or `offsets`, raw little-endian bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import numpy as np

from lowbit.passes.quant.quantized_weight import Chunk, QuantizedWeight
from lowbit.pipeline.store.store import Entry, Store
from lowbit.pipeline.store.weight_keys import SourceDigests, weight_key


def entry_of(weight: QuantizedWeight, sources: SourceDigests, store: Store) -> Entry:
    """The entry of a weight that needs no look at its inputs, made now if it is not there."""
    key = weight_key(weight, sources.of(weight.source))
    return store.get(key) or store.put(key, partial(write_entry, weight))


def write_entry(weight: QuantizedWeight, folder: Path) -> dict[str, float]:
    """Quantize a weight into files of a folder, one for each of its parts.

    Returns:
        Facts over all weights: `mse`, the mean squared error, and `relative_error`, |W' - W| / |W|; and `sampled_error`,
        the latter over the rows of `Weight.sample`, which tells later whether codes are those of this weight.
    """
    return write_chunks(weight, weight.chunks(), folder)


def write_chunks(weight: QuantizedWeight, chunks: Iterable[Chunk], folder: Path) -> dict[str, float]:
    """Write a quantized weight, given from the first row to the last, as `write_entry` does."""
    errors = {}
    files = {name: (folder / name).open("wb") for name in weight.parts}
    try:
        for rows, chunk in zip(weight.source.ranges(), chunks, strict=True):
            for name, stream in files.items():
                stream.write(memoryview(getattr(chunk, name)).cast("B"))
            errors[rows] = chunk.squared_error, chunk.square
    finally:
        for stream in files.values():
            stream.close()
    n, k = weight.source.shape
    squared_error = sum(error for error, _ in errors.values())
    return {
        "mse": squared_error / (n * k),
        "relative_error": relative_error(errors.values()),
        "sampled_error": relative_error(errors[rows] for rows in weight.source.sample()),
    }


def relative_error(sums: Iterable[tuple[float, float]]) -> float:
    """|W' - W| / |W| over rows of which the sums of squares of W' - W and of W are known."""
    errors, squares = zip(*sums, strict=True)
    return math.sqrt(sum(errors) / max(sum(squares), np.finfo(np.float64).tiny))
