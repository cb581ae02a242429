"""Token ids in, all logits out -> embeddings in, the logits asked for out."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass
from lowbit.passes.graph.decoder import find_linears, find_norms, need
from lowbit.passes.graph.match import SAME_VALUE, behind, constant_value, producer, readers, replace
from lowbit.passes.graph.quantized_ops import quantized_weight

COMPARISONS = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "And", "Or")
"""They make booleans, which casts do change."""
END = 2**30
"""Past the end of any sequence."""


class LowerInterface(Pass):
    """Give the graph the interface of MNN's LLM runtime, which looks embeddings up outside the graph.

    Inputs: `input_ids` float32 [tokens, 1, hidden], the embeddings (the runtime's name for them);
    `logits_index` int32 [1]: -1 for the logits of the last token, 0 for those of all.
    """

    def apply(self, graph: gs.Graph) -> Outcome:
        lookups = [n for n in graph.nodes if n.op in ("Gather", "GatherBlockQuantized") and _reads_ids(n)]
        need(len(lookups) == 1, f"expected one lookup of input_ids, found {[n.name for n in lookups]}.")
        hidden = _hidden_size(lookups[0])
        for tensor in graph.inputs:
            if tensor.name == "input_ids":
                tensor.name = "input_ids.exported"
        embedded = gs.Variable("input_ids", np.float32, ["tokens", 1, hidden])
        index = gs.Variable("logits_index", np.int32, [1])
        sequence = gs.Variable("embeddings", np.float32)
        shape = gs.Constant("embeddings.shape", np.array([1, -1, hidden], np.int64))
        graph.nodes.append(gs.Node("Reshape", "embeddings", {}, [embedded, shape], [sequence]))
        replace(lookups[0].outputs[0], sequence)
        _drop_casts(graph)
        _slice_last(graph, index)
        others = [t for t in graph.inputs if t.name != "input_ids.exported"]
        graph.inputs = [embedded, *others, index]
        graph.cleanup(remove_unused_graph_inputs=False).toposort()
        loose = _loose_ends(graph)
        need(not loose, f"the lowered graph still reads {loose}.")
        return Outcome((lookups[0].name,))


def _reads_ids(node: gs.Node) -> bool:
    return bool(behind(node.inputs[1]).name == "input_ids")


def _hidden_size(lookup: gs.Node) -> int:
    weight = quantized_weight(lookup)
    return int((lookup.inputs[0] if weight is None else weight.source).shape[1])


def _drop_casts(graph: gs.Graph) -> None:
    """Floats between embeddings and logits are float32: casts of them change nothing."""
    for node in list(graph.nodes):
        if node.op not in SAME_VALUE or isinstance(node.inputs[0], gs.Constant):
            continue
        maker = producer(node.inputs[0])
        if not _from_ids(node) and (maker is None or maker.op not in COMPARISONS):
            replace(node.outputs[0], node.inputs[0])


def _from_ids(node: gs.Node) -> bool:
    return behind(node.inputs[0]).name in ("input_ids", "input_ids.exported", "position_ids")


def _slice_last(graph: gs.Graph, index: gs.Tensor) -> None:
    """Cut the hidden states in front of the last norm, so that lm_head computes only what is asked for."""
    factor, logits = _unscaled_logits(graph)
    heads = [one for one in find_linears(graph).values() if one.y is logits]
    need(len(heads) == 1, "the logits do not come from one quantized MatMul.")
    finals = [norm for norm in find_norms(graph) if norm.y is behind(heads[0].x)]
    need(len(finals) == 1, f"'{heads[0].node.name}' does not read an RMSNorm.")
    final = finals[0]
    if factor != 1.0:
        need(heads[0].bias is None, f"'{heads[0].node.name}' has a bias, and its logits are scaled.")
        final.gamma.values = final.factors() * np.float32(factor)
        _end_in(graph, logits)
    cut = gs.Variable("last_hidden", np.float32)
    bounds = [
        gs.Constant(f"last_hidden.{name}", np.array([value], np.int32))
        for name, value in (("end", END), ("axis", 1), ("step", 1))
    ]
    own = {id(node) for node in readers(final.x)} & _ancestors(final.y)
    for node in readers(final.x):
        if id(node) in own:
            node.inputs = [cut if behind(one) is final.x else one for one in node.inputs]
    graph.nodes.append(gs.Node("Slice", "last_hidden", {}, [final.x, index, *bounds], [cut]))


def _unscaled_logits(graph: gs.Graph) -> tuple[float, gs.Tensor]:
    """What logits are multiplied by last, as Granite's are, and the tensor before that."""
    output = next(t for t in graph.outputs if t.name == "logits")
    node = producer(output)
    if node is None or node.op not in ("Mul", "Div"):
        return 1.0, output
    scalar = constant_value(node.inputs[1])
    if scalar is None or scalar.size != 1:
        return 1.0, output
    value = float(scalar.reshape(-1)[0])
    return (value if node.op == "Mul" else 1 / value), behind(node.inputs[0])


def _end_in(graph: gs.Graph, tensor: gs.Tensor) -> None:
    """Let `tensor` be the output `logits`."""
    (old,) = [t for t in graph.outputs if t.name == "logits"]
    old.name, tensor.name = "logits.scaled", "logits"
    tensor.dtype, tensor.shape = old.dtype, old.shape
    graph.outputs = [tensor if t is old else t for t in graph.outputs]


def _ancestors(tensor: gs.Tensor, depth: int = 8) -> set[int]:
    """Nodes at most `depth` steps before a tensor: more than an RMSNorm has."""
    found: set[int] = set()
    edge = [tensor]
    for _ in range(depth):
        nodes = [node for one in edge for node in one.inputs]
        found |= {id(node) for node in nodes}
        edge = [one for node in nodes for one in node.inputs]
    return found


def _loose_ends(graph: gs.Graph) -> list[str]:
    inputs = {id(t) for t in graph.inputs}
    return sorted(
        t.name
        for node in graph.nodes
        for t in node.inputs
        if not isinstance(t, gs.Constant) and not t.inputs and id(t) not in inputs
    )
