"""RMSNorm spelled out -> SimplifiedLayerNormalization, together with the Add in front of it where there is one."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass, PassError
from lowbit.passes.graph.decoder import Norm, find_norms
from lowbit.passes.graph.match import SAME_VALUE, behind, producer, readers, repeats, replace
from lowbit.passes.graph.quantized_ops import MICROSOFT


class FuseNorm(Pass):
    """One operator of onnxruntime for each RMSNorm (Zhang and Sennrich, arXiv:1910.07467), gamma as float32.

    Where the norm reads a sum that goes on as the residual, SkipSimplifiedLayerNormalization (com.microsoft operator
    documentation) adds and norms in one walk over the hidden states.
    """

    def apply(self, graph: gs.Graph) -> Outcome:
        norms = find_norms(graph)
        if not norms:
            raise PassError("no RMSNorm found: no weight is called *norm.weight.")
        for norm in norms:
            _rewrite(graph, norm)
        graph.cleanup().toposort()
        return Outcome(tuple(norm.gamma.name for norm in norms))


def add_norm(graph: gs.Graph, norm: Norm, x: gs.Tensor, y: gs.Tensor) -> None:
    """Add y = norm(x) over the last axis as one node."""
    attrs = {"epsilon": norm.epsilon, "axis": -1, "stash_type": 1}
    graph.nodes.append(gs.Node("SimplifiedLayerNormalization", norm.gamma.name, attrs, [x, _factors(norm)], [y]))


def _rewrite(graph: gs.Graph, norm: Norm) -> None:
    total = producer(norm.x)
    norm.y.inputs.clear()
    if total is None or total.op != "Add" or not _is_residual(total):
        add_norm(graph, norm, _widened(norm.x), norm.y)
        return
    terms, name = list(total.inputs), norm.gamma.name
    both, nothing = gs.Variable(f"{name}.sum", np.float32), gs.Variable.empty()
    replace(norm.x, both)
    outputs, attrs = [norm.y, nothing, nothing, both], {"epsilon": norm.epsilon}
    inputs = [*terms, _factors(norm)]
    graph.nodes.append(gs.Node("SkipSimplifiedLayerNormalization", name, attrs, inputs, outputs, domain=MICROSOFT))


def _widened(x: gs.Tensor) -> gs.Tensor:
    """The float32 tensor that repeats rows of a half-precision embedding, or `x` itself."""
    half = x.dtype is not None and x.dtype != np.float32
    return next((one for one in repeats(x) if one.dtype == np.float32), x) if half else x


def _factors(norm: Norm) -> gs.Constant:
    name = norm.gamma.name
    norm.gamma.name += ".stored"  # its successor takes the name
    return gs.Constant(name, norm.factors())


def _is_residual(total: gs.Node) -> bool:
    """Whether an Add adds two computed tensors, not a bias."""
    return not any(isinstance(behind(one, SAME_VALUE), gs.Constant) for one in total.inputs) and bool(readers(total.outputs[0]))
