"""What every pass that quantizes MatMuls is told: which, how codes are chosen, and how they are stored and run."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from lowbit.passes.base import Pass, Phase
from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import ScaleDtype, ZeroPoint
from lowbit.passes.registry import MethodChoice


class MatmulOptions(Pass):
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
    def plain(self) -> Pass:
        return self.model_copy(update={"method": Rtn(), "zero_point": "integer"})

    @property
    def phases(self) -> frozenset[Phase]:
        return frozenset({"calibration"} if self.method.calibrated else ())
