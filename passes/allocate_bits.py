"""A budget for the whole model -> bits and block size of every MatMul's weight."""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Literal, Self

import onnx_graphsurgeon as gs
from pydantic import Field, model_validator

from lowbit.passes.base import Outcome, Pass, PassError, Phase
from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quantize_matmul import MatmulOptions

UNITS = {"MB": 10**6, "GB": 10**9}
Bits = Literal[2, 3, 4, 8]
BlockSize = Literal[16, 32, 64, 128, 256]


class AllocateBits(MatmulOptions, Pass):
    """Give every weight the bits and block size that fit a budget with the least expected loss.

    A run measures what each weight costs at each choice and solves the integer program exactly; what it found is an
    ordinary recipe of `quantize_matmul`, `resolved.yaml` in the result. That recipe is what runs: this pass itself
    rewrites nothing.
    """

    fit: Annotated[str, Field(pattern=r"^\d+(\.\d+)? ?(MB|GB)$")] | None = None
    """Largest size of the first hand-off's folder (of the ONNX folder, without one), everything counted: `3.2GB`, `900MB`."""
    bits_per_weight: Annotated[float, Field(gt=0)] | None = None
    """Instead: stored bits per weight, scales and zero points counted, over the weights that this pass takes."""
    bits: Annotated[tuple[Bits, ...], Field(min_length=1)] = (2, 3, 4, 8)
    """Bits to choose from."""
    block_sizes: Annotated[tuple[BlockSize, ...], Field(min_length=1)] = (32, 64, 128)
    """Weights per scale to choose from."""
    sensitivity: Literal["kl", "fisher", "output_mse", "weight_mse"] = "kl"
    """What a weight is expected to lose: `kl`, the KL divergence of the model's output when that weight alone is quantized
    (the model must fit into memory in float); `fisher`, the same to second order, by gradients, one decoder block in memory
    at a time;
    `output_mse`, the relative squared error of a layer's outputs; or `weight_mse`, that of the weight, which needs no text."""
    groups: tuple[tuple[str, ...], ...] = ()
    """Layers that share one choice, by the last part of their names: `[[q_proj, k_proj, v_proj], [gate_proj, up_proj]]`."""

    target: str | None = None
    """A device whose speed counts: a file of targets/ beside the recipe, such as `snapdragon-8-elite`, or one that
    `lowbit measure` made."""
    max_relative_time: Annotated[float, Field(gt=0)] | None = None
    """How long all weights together may take there when decoding; 1 is what they take at 4 bits."""

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if (self.fit is None) == (self.bits_per_weight is None):
            raise ValueError("give either fit: 3.2GB or bits_per_weight: 3.25")
        if self.bits_per_weight is not None and self.bits_per_weight > 9:
            raise ValueError(f"bits_per_weight: {self.bits_per_weight:g} is more than 8 bits with their scales take; give less")
        if (self.target is None) != (self.max_relative_time is None):
            raise ValueError("target and max_relative_time belong together: where, and how long")
        if self.zero_point == "float" and (self.symmetric or 8 in self.bits):
            raise ValueError("zero_point: float goes with bits of 2, 3 and 4, and without symmetric")
        return self

    @property
    def phases(self) -> frozenset[Phase]:
        return super().phases | {"allocation"}

    @property
    def fit_bytes(self) -> int | None:
        """`fit` in bytes."""
        if self.fit is None:
            return None
        number, unit = re.fullmatch(r"([\d.]+) ?(MB|GB)", self.fit).groups()  # type: ignore[union-attr]
        return int(float(number) * UNITS[unit])

    def forms(self) -> list[BlockFormat]:
        """Every choice."""
        return [
            BlockFormat(bits, size, self.symmetric, self.scale_dtype, self.zero_point)
            for bits, size in itertools.product(sorted(set(self.bits)), sorted(set(self.block_sizes)))
        ]

    def group_of(self, name: str) -> str:
        """What a layer shares its choice by: its own name, or that of its group beside it."""
        prefix, _, kind = name.rpartition(".")
        number = next((i for i, group in enumerate(self.groups) if kind in group), None)
        return name if number is None else f"{prefix}.{'+'.join(self.groups[number])}"

    def apply(self, graph: gs.Graph) -> Outcome:
        raise PassError("allocate_bits becomes quantize_matmul before any pass is applied; use it in a recipe that is run.")
