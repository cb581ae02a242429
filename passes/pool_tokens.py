"""Hidden states of tokens -> one embedding a text, as embedding models end."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.passes.base import Outcome, Pass, PassError


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
            raise PassError(f"no output last_hidden_state to pool; there are {', '.join(t.name for t in graph.outputs)}.")

        def add(op: str, name: str, inputs: list[gs.Tensor], dtype: type = np.float32, **attrs: object) -> gs.Tensor:
            output = gs.Variable(f"pooling.{name}", dtype)
            graph.nodes.append(gs.Node(op, output.name, attrs, inputs, [output]))
            return output

        def numbers(name: str, *values: int) -> gs.Constant:
            return gs.Constant(f"pooling.{name}", np.array(values, np.int64))

        if self.mode == "cls":
            first = gs.Constant("pooling.first", np.array(0, np.int64))
            pooled = add("Gather", "cls", [hidden, first], axis=1)
        else:
            mask = next((t for t in graph.inputs if t.name == "attention_mask"), None)
            if mask is None:
                raise PassError("mode: mean needs the input attention_mask, which the graph has not.")
            weights = add("Unsqueeze", "column", [mask, numbers("last_axis", -1)], np.int64)
            weights = add("Cast", "weights", [weights], to=TensorProto.FLOAT)
            total = add("ReduceSum", "total", [add("Mul", "kept", [hidden, weights]), numbers("tokens", 1)], keepdims=0)
            pooled = add("Div", "mean", [total, add("ReduceSum", "count", [weights, numbers("tokens_too", 1)], keepdims=0)])
        if self.normalize:
            length = add("ReduceL2", "length", [pooled, numbers("features", -1)], keepdims=1)
            pooled = add("Div", "unit", [pooled, length])
        batch, _, size = hidden.shape
        pooled.name, pooled.shape = "sentence_embedding", [batch, size]
        graph.outputs = [pooled, *(t for t in graph.outputs if t is not hidden)]
        graph.cleanup().toposort()
        return Outcome((pooled.name,))
