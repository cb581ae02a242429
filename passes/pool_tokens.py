"""Hidden states of tokens -> one embedding a text, as embedding models end."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.passes.base import Outcome, Pass, PassError
from lowbit.passes.graph.build import add_node, integers


class PoolTokens(Pass):
    """Replace the output `last_hidden_state` [batch, tokens, hidden] by `sentence_embedding` [batch, hidden].

    Sentence-transformers (Reimers and Gurevych, arXiv:1908.10084) keep this step beside the model, in `1_Pooling/config.json`
    and `2_Normalize`; exports leave it out.
    """

    mode: Literal["mean", "cls"] = "mean"
    """`mean`: of all tokens that attention_mask keeps; `cls`: the first token."""
    normalize: bool = True
    """Whether the embedding is divided by its length."""

    @property
    def changes_outputs(self) -> bool:
        return True

    @property
    def keeps_shapes(self) -> bool:
        return True  # of weights; a plan has no tokens to pool

    def apply(self, graph: gs.Graph) -> Outcome:
        hidden = next((t for t in graph.outputs if t.name == "last_hidden_state"), None)
        if hidden is None:
            raise PassError(
                f"there is no output last_hidden_state to pool; the graph has {', '.join(t.name for t in graph.outputs)}."
            )
        if self.mode == "cls":
            first = gs.Constant("pooling.first", np.array(0, np.int64))
            pooled = add_node(graph, "Gather", "pooling.cls", [hidden, first], axis=1)
        else:
            pooled = _mean(graph, hidden)
        if self.normalize:
            length = add_node(graph, "ReduceL2", "pooling.length", [pooled, integers("pooling.features", -1)], keepdims=1)
            pooled = add_node(graph, "Div", "pooling.unit", [pooled, length])
        batch, _, size = hidden.shape
        pooled.name, pooled.shape = "sentence_embedding", [batch, size]
        graph.outputs = [pooled, *(t for t in graph.outputs if t is not hidden)]
        graph.cleanup().toposort()
        return Outcome((pooled.name,))


def _mean(graph: gs.Graph, hidden: gs.Tensor) -> gs.Tensor:
    """The mean of the tokens that attention_mask keeps, float32 [batch, hidden]."""
    mask = next((t for t in graph.inputs if t.name == "attention_mask"), None)
    if mask is None:
        raise PassError("mode: mean needs the input attention_mask, which the graph does not have; use mode: cls.")
    column = add_node(graph, "Unsqueeze", "pooling.column", [mask, integers("pooling.last_axis", -1)], np.int64)
    weights = add_node(graph, "Cast", "pooling.weights", [column], to=TensorProto.FLOAT)
    kept = add_node(graph, "Mul", "pooling.kept", [hidden, weights])
    total = add_node(graph, "ReduceSum", "pooling.total", [kept, integers("pooling.tokens", 1)], keepdims=0)
    count = add_node(graph, "ReduceSum", "pooling.count", [weights, integers("pooling.tokens_too", 1)], keepdims=0)
    return add_node(graph, "Div", "pooling.mean", [total, count])
