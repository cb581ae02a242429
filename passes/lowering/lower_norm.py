"""RMSNorm as exported, casts and all -> the plain float32 form that converters fuse."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass, PassError
from lowbit.passes.graph.decoder import Norm, find_norms


class LowerNorm(Pass):
    """Rewrite every RMSNorm as Pow, ReduceMean, Add, Sqrt, Div, Mul, Mul on float32, gamma as a constant.

    MNN fuses exactly this form: no casts in between, scalar constants of rank 0, gamma an initializer.
    """

    def apply(self, graph: gs.Graph) -> Outcome:
        norms = find_norms(graph)
        if not norms:
            raise PassError("no RMSNorm found: no weight is called *norm.weight.")
        names = tuple(norm.gamma.name for norm in norms)
        for norm in norms:
            _rewrite(graph, norm)
        graph.cleanup().toposort()
        return Outcome(names)


def _rewrite(graph: gs.Graph, norm: Norm) -> None:
    name = norm.gamma.name
    prefix = name.removesuffix(".weight")
    norm.gamma.name += ".stored"  # its successor takes the name
    gamma = gs.Constant(name, norm.factors())

    def scalar(part: str, value: float) -> gs.Constant:
        return gs.Constant(f"{prefix}.{part}", np.array(value, np.float32))

    def add(op: str, part: str, inputs: list[gs.Tensor], **attrs: object) -> gs.Tensor:
        output = gs.Variable(f"{prefix}.{part}", np.float32)
        graph.nodes.append(gs.Node(op, output.name, attrs, inputs, [output]))
        return output

    square = add("Pow", "square", [norm.x, scalar("two", 2.0)])
    axes = gs.Constant(f"{prefix}.axes", np.array([-1], np.int64))
    mean = add("ReduceMean", "mean", [square, axes], keepdims=1)
    root = add("Sqrt", "root", [add("Add", "shifted", [mean, scalar("epsilon", norm.epsilon)])])
    normed = add("Mul", "normed", [norm.x, add("Div", "reciprocal", [scalar("one", 1.0), root])])
    norm.y.inputs.clear()
    graph.nodes.append(gs.Node("Mul", f"{prefix}.y", {}, [gamma, normed], [norm.y]))
