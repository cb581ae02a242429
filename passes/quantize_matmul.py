"""MatMul by a constant weight -> MatMulNBits (2, 4, 8 bits) or MatMul3Bits (3 bits)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import onnx_graphsurgeon as gs
from pydantic import Field, model_validator

from lowbit.passes.base import Options, Outcome, Pass, PassError, Phase
from lowbit.passes.graph.match import MatmulWeight, matmul_weight
from lowbit.passes.graph.names import layer_name, select
from lowbit.passes.graph.quantized_ops import add_matmul, quantized_weight
from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import BlockFormat, ScaleDtype, ZeroPoint
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.registry import MethodChoice


class MatmulOptions(Options):
    """Options that `quantize_matmul` and `allocate_bits` share."""

    symmetric: bool = False
    """Without zero points: smaller by bits / block_size per weight, less accurate at 2 and 3 bits."""
    zero_point: ZeroPoint = "integer"
    """`float`: more accurate, and free in MNN, which stores offsets anyway; onnxruntime's file grows by 16 bits a block and
    is computed in float32, slowly."""
    method: MethodChoice = Rtn()
    """How codes are chosen: a file of passes/methods/."""
    scale_dtype: ScaleDtype = "fp16"
    """fp16 halves the scales; they are chosen so that fp16 holds them and MNN's offsets exactly."""
    include: tuple[str, ...] = ("*",)
    """Globs on layer names, such as `*.down_proj` or `lm_head`."""
    exclude: tuple[str, ...] = ()
    """Globs on layer names to leave as they are; stronger than `include`."""
    accuracy_level: Annotated[int, Field(ge=0, le=4)] = 4
    """onnxruntime's arithmetic: 4 = int8 activations (fast), 0 = float32 (exact)."""

    @property
    def plain(self) -> Self:
        return self.model_copy(update={"method": Rtn(), "zero_point": "integer"})

    @property
    def phases(self) -> frozenset[Phase]:
        return frozenset({"calibration"} if self.method.calibrated else ())


class QuantizeMatmul(MatmulOptions, Pass):
    """Block-quantize the constant right-hand side of every matching MatMul.

    Cases: the weight may be stored [N, K] behind a Transpose (as PyTorch exports it) or [K, N]; K need not
    be a multiple of the block. A weight that the embedding shares (tied) is quantized for the MatMul alone:
    the embedding keeps its float table until `quantize_embedding` says otherwise.
    """

    bits: Literal[2, 3, 4, 8]
    """Bits of a code: MNN's `quant_bit` (for lm_head its `lm_quant_bit`)."""
    block_size: Literal[16, 32, 64, 128, 256] = 128
    """Weights along K that share one scale: MNN's `quant_block`, elsewhere "group size"."""

    @model_validator(mode="after")
    def _check_zero_point(self) -> Self:
        if self.zero_point == "float" and self.symmetric:
            raise ValueError("zero_point: float and symmetric: true contradict each other; leave one out")
        if self.zero_point == "float" and self.bits == 8:
            raise ValueError(
                "onnxruntime runs float zero points at 2, 3 and 4 bits only; at 8 bits leave zero_point: float out"
            )
        return self

    def apply(self, graph: gs.Graph) -> Outcome:
        matmuls = find_matmuls(graph)
        done = {weight.name for node in graph.nodes if (weight := quantized_weight(node)) is not None}
        if not matmuls:
            taken = f"earlier passes took {', '.join(sorted(done)[:3])}" if done else "no MatMul has a constant 2-D weight"
            raise PassError(f"nothing to quantize: {taken}.")
        skipped = select(list(matmuls), self.include, self.exclude, also=done)
        rewritten = tuple(name for name in matmuls if name not in skipped)
        if not rewritten:
            raise PassError(f"nothing to quantize: include and exclude leave none of {len(matmuls)} layers.")
        notes = []
        for name in rewritten:
            node, operand = matmuls[name]
            self._rewrite(graph, name, node, operand)
            if operand.shared:
                notes.append(
                    f"{name} shares '{operand.constant.name}' with the embedding (tied): {name} gets codes of "
                    "its own, the embedding keeps its table unless quantize_embedding takes it"
                )
        graph.cleanup().toposort()
        return Outcome(rewritten, skipped, tuple(notes))

    def _rewrite(self, graph: gs.Graph, name: str, node: gs.Node, operand: MatmulWeight) -> None:
        form = BlockFormat(self.bits, self.block_size, self.symmetric, self.scale_dtype, self.zero_point)
        weight = QuantizedWeight(name, operand.weight, form, self.method)
        x, y = node.inputs[0], node.outputs[0]
        node.outputs.clear()
        node.inputs.clear()
        add_matmul(graph, weight, x, y, self.accuracy_level)


def find_matmuls(graph: gs.Graph) -> dict[str, tuple[gs.Node, MatmulWeight]]:
    """Every MatMul by a constant weight, by layer name."""
    matmuls: dict[str, tuple[gs.Node, MatmulWeight]] = {}
    for node in graph.nodes:
        if node.op != "MatMul" or (operand := matmul_weight(node)) is None:
            continue
        name = layer_name(operand.constant.name, node.name, operand.shared)
        if name in matmuls:
            raise PassError(
                f"two MatMuls, '{matmuls[name][0].name}' and '{node.name}', read the weight '{name}'; "
                "weights shared between layers are supported for embedding and lm_head only."
            )
        matmuls[name] = node, operand
    return matmuls
