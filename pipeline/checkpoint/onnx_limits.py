"""An ONNX graph -> refused if it is too large, too deep, or makes something huge or endless of constants."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx

from lowbit.pipeline.limits import (
    MOST_BODIES,
    MOST_CONSTANT_ELEMENTS,
    MOST_ELEMENTS,
    MOST_NODES,
    MOST_RANK,
    MOST_ROUNDS,
)

TYPES = set(onnx.TensorProto.DataType.values()) - {onnx.TensorProto.UNDEFINED}
Constants = dict[str, onnx.TensorProto]


def objection(graph: onnx.GraphProto) -> str | None:
    """What nobody's model has, as the end of a sentence about it; None if there is nothing."""
    return next(_objections(graph, {}, 0), None) or _too_many(graph)


def not_text(message: Any) -> bytes | None:
    """The first name in a model, or a part of one, that is not UTF-8: protobuf gives it as bytes, which no name is."""
    for field, value in message.ListFields():
        if field.type not in (field.TYPE_STRING, field.TYPE_MESSAGE):
            continue
        for part in [value] if isinstance(value, str | bytes) or hasattr(value, "ListFields") else value:
            found = part if isinstance(part, bytes) else None if isinstance(part, str) else not_text(part)
            if found is not None:
                return found
    return None


def _too_many(graph: onnx.GraphProto) -> str | None:
    count = sum(1 for _ in _nodes(graph))
    return f"has {count:,} nodes, at most {MOST_NODES:,} are read" if count > MOST_NODES else None


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for body in _bodies(node):
            yield from _nodes(body)


def _bodies(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def _objections(graph: onnx.GraphProto, outer: Constants, depth: int) -> Iterator[str]:
    if depth > MOST_BODIES:
        yield f"has bodies of If, Loop or Scan in one another more than {MOST_BODIES} deep"
        return
    for sparse in graph.sparse_initializer:
        yield f"has the sparse tensor '{sparse.values.name}'; write its zeros out, too, and export it again"
    for tensor in graph.initializer:
        if any(size < 0 for size in tensor.dims) or math.prod(tensor.dims) > MOST_ELEMENTS or len(tensor.dims) > MOST_RANK:
            yield f"is not a valid ONNX model: '{tensor.name}' has {list(tensor.dims)[: MOST_RANK + 1]} elements"
        if tensor.data_type not in TYPES:
            yield f"has the tensor '{tensor.name}' of the type {tensor.data_type}, which ONNX does not know"
    constants = outer | {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        name = f"{node.op_type} '{node.output[0] if node.output else node.name}'"
        for attribute in node.attribute:
            if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
                yield f"has a sparse tensor in {name}; write its zeros out, too, and export it again"
            if node.op_type == "Constant" and attribute.name == "value" and node.output:
                constants[node.output[0]] = attribute.t
        given = [_values(constants.get(name)) for name in node.input]
        if (elements := _elements(node.op_type, given)) > MOST_CONSTANT_ELEMENTS:
            yield f"makes {elements:.0f} elements of constants in {name}, at most {MOST_CONSTANT_ELEMENTS:,} are allowed"
        if node.op_type == "Loop" and not (given and given[0] is not None and float(given[0].max(initial=0)) <= MOST_ROUNDS):
            yield f"has a {name} whose number of rounds is no constant up to {MOST_ROUNDS:,}, so it may have no end"
        for body in _bodies(node):
            yield from _objections(body, constants, depth + 1)


def _values(tensor: onnx.TensorProto | None) -> np.ndarray | None:
    """A small constant's numbers, float64 flat; None for what is computed, large or in another file."""
    if tensor is None or tensor.data_location == onnx.TensorProto.EXTERNAL or math.prod(tensor.dims) > MOST_RANK:
        return None
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor), np.float64).ravel()
    except (ValueError, TypeError):  # texts, or fewer bytes than the shape needs: no shape of anything
        return None


def _elements(kind: str, given: list[np.ndarray | None]) -> float:
    """How many elements an operator makes of constants that say how many; 0 where none do."""
    if kind == "ConstantOfShape" and given and given[0] is not None:
        return float(np.prod(given[0]))
    if kind in ("Expand", "Tile") and len(given) > 1 and given[1] is not None:
        return float(np.prod(given[1]))
    if kind == "Range" and len(given) > 2 and all(part is not None and part.size for part in given):
        start, limit, delta = (float(part[0]) for part in given if part is not None)
        return max(0.0, (limit - start) / delta) if delta else 0.0
    return 0
