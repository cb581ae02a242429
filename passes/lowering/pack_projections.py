"""Quantized q_proj, k_proj and v_proj -> one MatMul in front of GroupQueryAttention."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass
from lowbit.passes.graph.build import add_node
from lowbit.passes.graph.match import before_bias
from lowbit.passes.graph.quantized_ops import add_matmul, quantized_weight
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import StackedWeight, weight_of, widened


class PackProjections(Pass):
    """Multiply by queries', keys' and values' weights at once: fewer, larger products decode faster.

    Their rows are stacked, q over k over v, as the operator's packed form wants them (com.microsoft operator documentation).
    Left alone: layers whose three differ in bits, blocks or arithmetic, or whose heads are normed in between.
    """

    @property
    def may_rewrite_nothing(self) -> bool:
        return True

    def apply(self, graph: gs.Graph) -> Outcome:
        rewritten, skipped = [], {}
        for node in [one for one in graph.nodes if one.op == "GroupQueryAttention"]:
            parts = [_projection(tensor) for tensor in node.inputs[:3]]
            found = [part for part in parts if part is not None]
            if len(found) < 3:
                skipped[node.name] = "something stands between its projections and itself"
            elif len({_kind(*part) for part in found}) > 1:
                skipped[node.name] = "its projections differ in bits, blocks, arithmetic or input"
            else:
                packed = _pack(graph, f"{node.name}.qkv_proj", found)
                node.inputs = [packed, gs.Variable.empty(), gs.Variable.empty(), *node.inputs[3:]]
                rewritten.append(node.name)
        graph.cleanup().toposort()
        return Outcome(tuple(rewritten), skipped)


_Projection = tuple[gs.Node, QuantizedWeight, gs.Constant | None]


def _projection(tensor: gs.Tensor) -> _Projection | None:
    """The quantized MatMul that makes `tensor`, its weight and the bias between them."""
    node, bias = before_bias(tensor)
    weight = None if node is None else quantized_weight(node)
    return None if node is None or weight is None else (node, weight, None if bias is None else bias.constant)


def _kind(matmul: gs.Node, weight: QuantizedWeight, bias: gs.Constant | None) -> tuple[object, ...]:
    """What the products of a packed layer must have in common."""
    dtype = None if bias is None else weight_of(bias).onnx_dtype
    return id(matmul.inputs[0]), weight.form, matmul.attrs["accuracy_level"], dtype


def _pack(graph: gs.Graph, name: str, parts: list[_Projection]) -> gs.Tensor:
    """One product for all of `parts`, float32 [..., sum of N]."""
    (first, weight, bias), *_ = parts
    stacked = StackedWeight([(one.name, one.source) for _, one, _ in parts])
    y = gs.Variable(f"{name}.y", np.float32)
    packed = QuantizedWeight(name, stacked, weight.form, weight.method)
    add_matmul(graph, packed, first.inputs[0], y, first.attrs["accuracy_level"])
    if bias is None:
        return y
    values = StackedWeight([(one.name, weight_of(one)) for _, _, one in parts if one is not None])
    return add_node(graph, "Add", f"{name}.biased", [y, widened(graph, f"{name}.bias", values)])
