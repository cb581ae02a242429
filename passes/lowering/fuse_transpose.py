"""MatMul by the Transpose of a constant -> FusedMatMul(transB=1), which reads the constant as it is."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass
from lowbit.passes.graph.match import behind, producer
from lowbit.passes.graph.quantized_ops import MICROSOFT


class FuseTranspose(Pass):
    """Let MatMuls read weights [N, K], as checkpoints keep them, without turning them first.

    onnxruntime would turn every weight when it loads a model, single-threaded: three quarters of the time that the float
    model of 7B takes to load. FusedMatMul (com.microsoft operator documentation) gives the same bits.
    """

    @property
    def may_rewrite_nothing(self) -> bool:
        return True

    def apply(self, graph: gs.Graph) -> Outcome:
        fused = []
        for node in graph.nodes:
            turn = producer(node.inputs[1]) if node.op == "MatMul" else None
            if turn is None or turn.op != "Transpose" or turn.attrs.get("perm") != [1, 0]:
                continue
            if isinstance(behind(turn.inputs[0]), gs.Constant):
                node.op, node.domain, node.attrs = "FusedMatMul", MICROSOFT, {"transB": 1}
                node.inputs[1] = turn.inputs[0]
                fused.append(node.name)
        graph.cleanup().toposort()
        return Outcome(tuple(fused))
