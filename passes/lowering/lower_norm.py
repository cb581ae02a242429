"""RMSNorm as exported, casts and all -> the plain float32 form that converters fuse."""

from __future__ import annotations

import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass, PassError
from lowbit.passes.graph.build import add_node, integers, scalar
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
    square = add_node(graph, "Pow", f"{prefix}.square", [norm.x, scalar(f"{prefix}.two", 2.0)])
    mean = add_node(graph, "ReduceMean", f"{prefix}.mean", [square, integers(f"{prefix}.axes", -1)], keepdims=1)
    shifted = add_node(graph, "Add", f"{prefix}.shifted", [mean, scalar(f"{prefix}.epsilon", norm.epsilon)])
    root = add_node(graph, "Sqrt", f"{prefix}.root", [shifted])
    reciprocal = add_node(graph, "Div", f"{prefix}.reciprocal", [scalar(f"{prefix}.one", 1.0), root])
    normed = add_node(graph, "Mul", f"{prefix}.normed", [norm.x, reciprocal])
    norm.y.inputs.clear()
    graph.nodes.append(gs.Node("Mul", f"{prefix}.y", {}, [gamma, normed], [norm.y]))
