"""A toy pass with a calibrated method of its own: four bits, each weight counted by how large its inputs are."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass, Phase
from lowbit.passes.graph.quantized_ops import add_matmul
from lowbit.passes.methods.mse import search
from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method, needed
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quantize_matmul import find_matmuls


class ByInputs(Method):
    """The search of `mse`, weighted."""

    calibrated: ClassVar[bool] = True

    def quantize(self, rows: np.ndarray, form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        return search(rows, form, needed(hessian).diagonal)


class QuantizeByInputs(Pass):
    """Quantize every MatMul by a constant weight to 4 bits."""

    block_size: int = 32

    @property
    def phases(self) -> frozenset[Phase]:
        return frozenset({"calibration"})

    def apply(self, graph: gs.Graph) -> Outcome:
        form = BlockFormat(4, self.block_size, symmetric=False, scale_dtype="fp16", zero_point="integer")
        found = find_matmuls(graph)
        for name, (node, operand) in found.items():
            x, y = node.inputs[0], node.outputs[0]
            node.outputs.clear()
            node.inputs.clear()
            add_matmul(graph, QuantizedWeight(name, operand.weight, form, ByInputs()), x, y, 4)
        graph.cleanup().toposort()
        return Outcome(tuple(found))
