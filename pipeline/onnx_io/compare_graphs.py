"""Two model files -> the first thing in which their graphs differ, weights in the data file apart."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

import onnx
from onnx import TensorProto

from lowbit.pipeline.onnx_io.reader import read_model


def graph_difference(ours: Path, theirs: Path) -> str | None:
    """A sentence's end on the first node, constant, input or output of `ours` that is another in `theirs`; None if all agree.

    Raises:
        PipelineError: one is no model file.
    """
    things = zip_longest(*(_things(read_model(file)) for file in (ours, theirs)), fillvalue=("", b""))
    return next((f"its {one[0] or other[0]} is another" for one, other in things if one != other), None)


def _things(model: onnx.ModelProto) -> Iterator[tuple[str, bytes]]:
    """All that a graph computes, in the order of the file, each with what it is called."""
    graph = model.graph
    for value in (*graph.input, *graph.output):
        yield f"interface '{value.name}'", value.SerializeToString(deterministic=True)
    for tensor in graph.initializer:
        yield f"constant '{tensor.name}'", _without_place(tensor).SerializeToString(deterministic=True)
    for node in graph.node:
        yield f"{node.op_type} '{node.name or node.output[0]}'", node.SerializeToString(deterministic=True)


def _without_place(tensor: TensorProto) -> TensorProto:
    """The tensor but for where its data lies: files are compared as such."""
    bare = TensorProto()
    bare.CopyFrom(tensor)
    del bare.external_data[:]
    return bare
