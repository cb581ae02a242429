"""Add nodes to a graph."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs


def add_node(
    graph: gs.Graph, op: str, name: str, inputs: list[gs.Tensor], dtype: type | None = np.float32, **attributes: object
) -> gs.Tensor:
    """Add a node with one output; both are called `name`, and the output is returned."""
    output = gs.Variable(name, dtype)
    graph.nodes.append(gs.Node(op, name, attributes, inputs, [output]))
    return output


def integers(name: str, *values: int) -> gs.Constant:
    """A constant vector, int64 [values]."""
    return gs.Constant(name, np.array(values, np.int64))


def scalar(name: str, value: float) -> gs.Constant:
    """A constant of rank 0, float32."""
    return gs.Constant(name, np.array(value, np.float32))
