"""A written ONNX file and the weights that it was made of -> the weights whose codes are not those of their source.

The other proofs compare file with file; this one reads a sample of rows of every weight from the checkpoint again, so codes of
another layer, wherever they came from, do not pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from lowbit.passes.graph.quantized_ops import quantized_weight
from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.quantized_weight import QuantizedWeight, squared_error
from lowbit.passes.quant.weights import Weight, as_bits
from lowbit.pipeline.onnx_io.entry import relative_error
from lowbit.pipeline.onnx_io.reader import read_layers
from lowbit.pipeline.onnx_io.stored_layer import StoredLayer
from lowbit.pipeline.store.store import Entry

CLOSE = 1e-3
"""How far, relatively, the error of a weight's sample may be from the one that was noted with its codes.

Of the same rows and codes it is the same sum in float64; rows that were rotated by another processor's matrix product differ in
the last bits of float32, 1e-6. Codes of another layer miss by sqrt(1 + |W'|^2 / |W|^2), so by 1 at least and by 1.4 where both
are of one size, while codes that are worth anything miss by less than 1: zeros would miss by just that.
"""
Piece = tuple[int, npt.NDArray[Any]]
"""The number of a row, and some rows from it on, [rows, K]."""


def wrong_weights(graph: gs.Graph, model_file: Path, entries: dict[QuantizedWeight, Entry]) -> dict[QuantizedWeight, str]:
    """The weights of `graph` whose codes in `model_file` are not what their source gives, each with what is wrong.

    A method that needs no data is run again: codes, scales and zero points of the sampled rows must be equal. Where
    calibration or training chose them, their error over these rows must be the one that was noted with them.

    Args:
        model_file: what `graph` was written to.
        entries: what was noted of each weight.
    """
    stored = read_layers(model_file)
    layers = {weight: stored[node.name] for node in graph.nodes if (weight := quantized_weight(node)) is not None}
    found = {weight: _fault(weight, layer, entries[weight]) for weight, layer in layers.items()}
    return {weight: fault for weight, fault in found.items() if fault is not None}


def chosen_by_data(weight: QuantizedWeight) -> bool:
    """Whether calibration or training has a say in the codes, so that they do not follow from the weight alone."""
    return weight.method.calibrated or weight.training is not None


def _fault(weight: QuantizedWeight, layer: StoredLayer, entry: Entry) -> str | None:
    if not chosen_by_data(weight):
        return next(filter(None, in_order(partial(_difference, weight, layer), _sample(weight.source))), None)
    noted = entry.facts["sampled_error"]
    measured = relative_error(in_order(partial(_squares, layer), _sample(weight.source)))
    if math.isclose(noted, measured, rel_tol=CLOSE):
        return None
    return f"their relative error is {measured:.3f}, and was {noted:.3f} when they were chosen"


def _sample(source: Weight) -> Iterator[Piece]:
    read = source.reader()
    for start, stop in source.sample():
        yield start, read(start, stop)


def _difference(weight: QuantizedWeight, layer: StoredLayer, piece: Piece) -> str | None:
    """The first part of some rows that the method does not give now."""
    chunk, (start, stop) = weight.quantize(piece), _rows(piece)
    for part in weight.parts:
        if getattr(layer, part).rows(start, stop).tobytes() != getattr(chunk, part).tobytes():
            return f"{weight.method_name} gives other {part.replace('_', ' ')} for rows {start} to {stop - 1}"
    return None


def _squares(layer: StoredLayer, piece: Piece) -> tuple[float, float]:
    """Sums of squares of the error of some rows, and of the rows."""
    blocks, (bits, shift) = layer.block_rows(*_rows(piece)), as_bits(piece[1])
    error, square = squared_error(bits, np.uint32(shift), blocks.codes, blocks.scales, blocks.zero_points)
    return error, square


def _rows(piece: Piece) -> tuple[int, int]:
    start, rows = piece
    return start, start + len(rows)
