"""Identity, Cast to the type it has, and Transpose pairs that cancel -> nothing."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass
from lowbit.passes.graph.match import producer


class RemoveIdentities(Pass):
    """Take out nodes that hand their input on unchanged.

    Exporters leave Identity nodes behind where weights have equal values, and Casts from float32 to
    float32 around norms. They hide weights from other passes and constants from onnxruntime.
    """

    @property
    def may_rewrite_nothing(self) -> bool:
        return True

    def apply(self, graph: gs.Graph) -> Outcome:
        removed = []
        for node in list(graph.nodes):
            source = _unchanged(node)
            if source is None or node.outputs[0] in graph.outputs:
                continue
            for reader in list(node.outputs[0].outputs):
                reader.inputs = [source if one is node.outputs[0] else one for one in reader.inputs]
            removed.append(node.name)
        graph.cleanup().toposort()
        return Outcome(tuple(removed))


def _unchanged(node: gs.Node) -> gs.Tensor | None:
    """The tensor that the node's output repeats exactly, or None."""
    if node.op == "Identity":
        return node.inputs[0]
    if node.op == "Cast" and node.inputs[0].dtype is not None and _onnx_type(node.inputs[0].dtype) == node.attrs["to"]:
        return node.inputs[0]
    if node.op == "Transpose":
        inner = producer(node.inputs[0])
        if inner is not None and inner.op == "Transpose" and "perm" in node.attrs and "perm" in inner.attrs:
            outer, first = node.attrs["perm"], inner.attrs["perm"]
            if [first[axis] for axis in outer] == list(range(len(outer))):
                return inner.inputs[0]
    return None


def _onnx_type(dtype: object) -> int:
    return dtype if isinstance(dtype, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))  # type: ignore[call-overload]
