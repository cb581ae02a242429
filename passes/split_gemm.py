"""Gemm -> MatMul and Add, which the other passes know."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass
from lowbit.passes.graph.build import add_node


class SplitGemm(Pass):
    """Rewrite y = x @ B + C, as exporters spell a linear layer over plain rows; B may be transposed.

    Left alone: Gemm that transposes x or scales anything.
    """

    @property
    def may_rewrite_nothing(self) -> bool:
        return True

    def apply(self, graph: gs.Graph) -> Outcome:
        rewritten, skipped = [], {}
        for node in [node for node in graph.nodes if node.op == "Gemm"]:
            attrs = node.attrs
            if attrs.get("transA", 0) or attrs.get("alpha", 1.0) != 1.0 or attrs.get("beta", 1.0) != 1.0:
                skipped[node.name] = "it transposes its first operand or scales"
                continue
            x, weight, *bias = node.inputs
            (y,) = node.outputs
            node.outputs.clear()
            if attrs.get("transB", 0):
                weight = add_node(graph, "Transpose", f"{node.name}.turned", [weight], perm=[1, 0])
            product = gs.Variable(f"{node.name}.product", np.float32) if bias else y
            graph.nodes.append(gs.Node("MatMul", f"{node.name}.matmul", {}, [x, weight], [product]))
            if bias:
                graph.nodes.append(gs.Node("Add", f"{node.name}.add", {}, [product, bias[0]], [y]))
            rewritten.append(node.name)
        graph.cleanup().toposort()
        return Outcome(tuple(rewritten), skipped)
