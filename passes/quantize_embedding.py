"""Gather from a constant table -> GatherBlockQuantized."""

from __future__ import annotations

from typing import Literal

import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.passes.base import Outcome, Pass, PassError
from lowbit.passes.graph.match import behind, readers
from lowbit.passes.graph.quantized_ops import MICROSOFT, as_float
from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import BlockFormat, ScaleDtype
from lowbit.passes.quant.quantized_weight import Part, QuantizedWeight
from lowbit.passes.quant.weights import weight_of
from lowbit.passes.registry import MethodChoice


class QuantizeEmbedding(Pass):
    """Block-quantize the embedding table (com.microsoft.GatherBlockQuantized, onnxruntime's operator docs).

    A table tied to lm_head that `quantize_matmul` gave the same options is stored once for both.
    """

    bits: Literal[4, 8]
    """MNN reads quantized tables of 4 and 8 bits, so no others are made."""
    block_size: Literal[16, 32, 64, 128, 256] = 128
    """Must divide the hidden size."""
    method: MethodChoice = Rtn()
    """How codes are chosen: a file of passes/methods/."""
    scale_dtype: ScaleDtype = "fp16"

    @property
    def plain(self) -> Pass:
        return self.model_copy(update={"method": Rtn()})

    def apply(self, graph: gs.Graph) -> Outcome:
        rewritten, notes = [], []
        for node in list(graph.nodes):
            table = behind(node.inputs[0]) if node.op == "Gather" else None
            if not isinstance(table, gs.Constant) or len(table.shape) != 2 or node.attrs.get("axis", 0) != 0:
                continue
            if not _is_float(table):
                continue
            name = table.name.removesuffix(".weight")
            if table.shape[1] % self.block_size:
                raise PassError(
                    f"{name}: rows of {table.shape[1]} do not divide into blocks of {self.block_size}; "
                    "choose a block_size that divides."
                )
            if any(reader.op == "Transpose" for reader in readers(table)):
                notes.append(f"{name} is tied: a MatMul still reads the float table; quantize it by quantize_matmul too")
            self._rewrite(graph, node, table, name)
            rewritten.append(name)
        if not rewritten:
            raise PassError("no Gather reads a constant float table [rows, columns]; remove quantize_embedding.")
        graph.cleanup().toposort()
        return Outcome(tuple(rewritten), notes=tuple(notes))

    def _rewrite(self, graph: gs.Graph, node: gs.Node, table: gs.Constant, name: str) -> None:
        form = BlockFormat(self.bits, self.block_size, False, self.scale_dtype)
        weight = QuantizedWeight(name, weight_of(table), form, self.method)
        rows, columns = table.shape
        codes = Part(weight, "codes", (rows, columns * self.bits // 8), TensorProto.UINT8)  # flat, not by blocks
        scales = as_float(graph, weight, "scales", gs.Constant(f"{name}.scales", weight.parts["scales"]))
        zeros = gs.Constant(f"{name}.zero_points", weight.parts["zero_points"])
        inputs = [gs.Constant(f"{name}.codes", codes), node.inputs[1], scales, zeros]
        attrs = {"bits": self.bits, "block_size": self.block_size, "gather_axis": 0, "quantize_axis": 1}
        output = _float_output(node)
        maker = output.inputs[0]
        maker.outputs.clear()
        graph.nodes.append(gs.Node("GatherBlockQuantized", name, attrs, inputs, [output], domain=MICROSOFT))


def _is_float(table: gs.Constant) -> bool:
    return weight_of(table).onnx_dtype in (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def _float_output(node: gs.Node) -> gs.Tensor:
    """What readers of the lookup see: its output, or that of the Cast which widens a half-precision one."""
    after = list(node.outputs[0].outputs)
    widened = len(after) == 1 and after[0].op == "Cast" and node.outputs[0].dtype is not None
    return after[0].outputs[0] if widened else node.outputs[0]
