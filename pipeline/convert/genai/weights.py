"""A fused graph, and the quantized model that its weights lie in -> model.onnx and model.onnx.data for onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from lowbit.passes.lowering.pack_projections import PackProjections
from lowbit.passes.quant.quantized_weight import Part
from lowbit.passes.quant.weights import ArrayWeight, StackedWeight, Weight, rows_per_chunk
from lowbit.pipeline.onnx_io.reader import region
from lowbit.pipeline.onnx_io.stored_layer import Region
from lowbit.pipeline.onnx_io.writer import DATA, MODEL, DataFile, exported, external_weights, write_model
from lowbit.pipeline.runtime.session import load_model
from lowbit.pipeline.runtime.three_bits import as_four_bits, expanded

INLINE_BYTES = 1 << 16
"""Larger constants than this go into the data file."""
Rows = Iterable[npt.NDArray[Any]]
"""A tensor from its first row to its last, a few megabytes at a time."""


def write_weights(graph: gs.Graph, model_file: Path, folder: Path, folded: bool, progress: Callable[[float], None]) -> None:
    """Write `graph` with queries, keys and values in one product; codes are those of `model_file`.

    Args:
        folded: store three-bit codes as nibbles.
    """
    PackProjections().apply(graph)
    _move_out_tables(graph)
    quantized = load_model(model_file)
    model = exported(graph, {entry.key: entry.value for entry in quantized.metadata_props})
    nibbles = as_four_bits(model) if folded else {}
    stored = {tensor.name: region(model_file, tensor) for tensor in quantized.graph.initializer if tensor.external_data}
    weights = external_weights(graph)
    data = DataFile(folder / DATA)
    for done, (name, weight) in enumerate(weights.items(), 1):
        size = int(np.prod(nibbles[name])) if name in nibbles else weight.nbytes
        rows = _rows_of(name, weight, stored, expanded if name in nibbles else _rows)
        data.append(name, size, (np.ascontiguousarray(piece).view(np.uint8).data.cast("B") for piece in rows))
        progress(done / len(weights))
    data.close()
    _widen(model, nibbles)
    write_model(model, folder / MODEL, {name: data.places[name] for name in weights})


def _move_out_tables(graph: gs.Graph) -> None:
    """Large constants (the tables that attention rotates by) become weights, which lie in the data file."""
    for tensor in graph.tensors().values():
        inline = tensor._values if isinstance(tensor, gs.Constant) else None
        if isinstance(inline, np.ndarray) and inline.nbytes > INLINE_BYTES:
            tensor.values = ArrayWeight(inline)


def _widen(model: onnx.ModelProto, nibbles: dict[str, list[int]]) -> None:
    for tensor in model.graph.initializer:
        if tensor.name in nibbles:
            tensor.dims[:] = nibbles[tensor.name]


def _rows_of(name: str, weight: Weight, stored: dict[str, Region], read: Callable[[Region], Rows]) -> Rows:
    """The rows of a weight: from memory, or those of the stored tensors that make it up."""
    if isinstance(weight, ArrayWeight):
        return [weight.array]
    return (piece for part in _parts(name, weight) for piece in read(stored[part]))


def _parts(name: str, weight: Weight) -> list[str]:
    """The tensors of the quantized model whose rows make up the weight called `name`."""
    if isinstance(weight, StackedWeight):
        return [part for part, _ in weight.parts]
    if isinstance(weight, Part) and isinstance(weight.of.source, StackedWeight):
        return [f"{layer}.{weight.part}" for layer, _ in weight.of.source.parts]
    return [name]


def _rows(source: Region) -> Iterator[npt.NDArray[Any]]:
    count = source.shape[0] if source.shape else 1
    step = rows_per_chunk(source.row_bytes)
    return (source.rows(start, min(start + step, count)) for start in range(0, count, step))
