"""Gather from a table widened to float32 -> Gather from the table as stored, then Cast."""

from __future__ import annotations

from typing import Literal

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.passes.base import Outcome, Pass
from lowbit.passes.graph.match import behind
from lowbit.passes.quant.weights import CastWeight, weight_of

DTYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FLOATS = frozenset({TensorProto.FLOAT, *DTYPES.values()})


class NarrowEmbedding(Pass):
    """Look embeddings up in half precision and widen only the rows that were looked up.

    Left as it is, onnxruntime widens the whole table when it loads the model: at 152064 x 3584 that is
    2.2 GB instead of 1.1. `stored` changes no value: a table that is float32 in the checkpoint stays so.
    """

    dtype: Literal["stored", "bf16", "fp16"] = "stored"
    """The checkpoint's own dtype, or round to this one (MNN keeps float embeddings as bf16 or fp16)."""

    @property
    def may_rewrite_nothing(self) -> bool:
        return self.dtype == "stored"

    def apply(self, graph: gs.Graph) -> Outcome:
        rewritten = []
        for node in list(graph.nodes):
            table = behind(node.inputs[0]) if node.op == "Gather" else None
            if not isinstance(table, gs.Constant) or len(table.shape) != 2:
                continue
            weight = weight_of(table)
            wanted = DTYPES.get(self.dtype, weight.onnx_dtype)
            narrow = node.inputs[0] is table and wanted == weight.onnx_dtype
            if weight.onnx_dtype not in FLOATS or wanted == TensorProto.FLOAT or narrow:
                continue
            if wanted != weight.onnx_dtype:
                table = gs.Constant(f"{table.name}.{self.dtype}", CastWeight(weight, wanted))
            _rewrite(graph, node, table)
            rewritten.append(table.name.removesuffix(".weight"))
        graph.cleanup().toposort()
        return Outcome(tuple(rewritten))


def _rewrite(graph: gs.Graph, node: gs.Node, table: gs.Constant) -> None:
    looked_up = node.outputs[0]
    narrow = gs.Variable(f"{table.name}.rows", table._values.dtype)
    node.inputs[0] = table
    node.outputs = [narrow]
    cast = gs.Node("Cast", f"{table.name}.widen_rows", {"to": TensorProto.FLOAT}, [narrow], [looked_up])
    graph.nodes.append(cast)
    looked_up.dtype = np.float32
