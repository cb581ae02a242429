"""Block quantization: what a code means, and which scales a file can hold exactly.

    weight = (code - zero_point) * scale

`code` and `zero_point` are integers in [0, 2^bits - 1]; `block_size` weights along K share one scale and
one zero point. This is onnxruntime's MatMulNBits (com.microsoft operator documentation); MNN stores the
same grid as weight = (code - 2^(bits-1)) * scale + offset with offset = (2^(bits-1) - zero_point) * scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np

ScaleDtype = Literal["fp16", "fp32"]


@dataclass(frozen=True)
class BlockFormat:
    """How one weight [N, K] is stored: bits of a code, weights per scale, and dtype of the scales."""

    bits: int
    block_size: int
    symmetric: bool
    scale_dtype: ScaleDtype

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The zero point of a symmetric format: 2^(bits-1)."""
        return 1 << (self.bits - 1)

    @property
    def zero_point_bits(self) -> int:
        """Stored bits of a zero point: three-bit codes run as nibbles, and so do their zero points."""
        return 4 if self.bits == 3 else self.bits

    @property
    def precision(self) -> int:
        """Significand bits of the scale dtype, the hidden one included."""
        return 11 if self.scale_dtype == "fp16" else 24

    @property
    def smallest_scale(self) -> float:
        """The step of the scale dtype around zero: 2^-24 (half) or 2^-149 (single)."""
        return 2.0**-24 if self.scale_dtype == "fp16" else 2.0**-149

    @property
    def largest_scale(self) -> float:
        """A scale up to this has an offset of at most 2^(bits-1) scales that does not overflow."""
        return (65504.0 if self.scale_dtype == "fp16" else float(np.finfo(np.float32).max)) / self.middle

    def block_count(self, k: int) -> int:
        """Blocks along K = `k`; the last one may be ragged."""
        return -(-k // self.block_size)

    def bits_per_weight(self, k: int) -> float:
        """Stored bits per weight of a row of `k` in the ONNX file, scales and zero points counted."""
        blocks = self.block_count(k)
        scale_bits = 16 if self.scale_dtype == "fp16" else 32
        zero_bits = 0 if self.symmetric else 8 * math.ceil(blocks * self.zero_point_bits / 8)
        return (blocks * (self.block_size * self.bits + scale_bits) + zero_bits) / k


@dataclass
class Blocks:
    """A run of quantized rows.

    Attributes:
        codes: uint8 [rows, blocks * block_size]; the padding of a ragged last block holds its zero point.
        scales: float32 [rows, blocks].
        zero_points: uint8 [rows, blocks].
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray

    def dequantize(self, k: int) -> np.ndarray:
        """The weights that these codes stand for, float32 [rows, k]."""
        rows, blocks = self.scales.shape
        steps = self.codes.reshape(rows, blocks, -1).astype(np.float32) - self.zero_points[..., None]
        return np.asarray((steps * self.scales[..., None]).reshape(rows, -1)[:, :k], np.float32)


def rounding_table(form: BlockFormat) -> np.ndarray:
    """What `exact_scale` needs to know per zero point: float32 [2^bits, 2] = (splitter, fixed-step limit).

    MNN stores scale and (2^(bits-1) - zero_point) * scale. With |2^(bits-1) - zero_point| = odd * 2^j and
    `odd` of k bits, the product is exact whenever the scale has at most precision - k significand bits
    (all of them when odd is 1). Below the limit the dtype is subnormal: a fixed step, not fixed digits.
    """
    table = np.empty((form.max_code + 1, 2), np.float32)
    for zero_point in range(form.max_code + 1):
        odd = abs(form.middle - zero_point)
        while odd and odd % 2 == 0:
            odd //= 2
        keep = form.precision - (odd.bit_length() if odd > 1 else 0)
        table[zero_point] = (1 << (24 - keep)) + 1, form.smallest_scale * 2.0 ** (keep - 1)
    return table


def exact_scales(scales: np.ndarray, zero_points: np.ndarray, form: BlockFormat) -> np.ndarray:
    """`exact_scale` of each of `scales`, float32 [rows, blocks], with its zero point."""
    found = np.ascontiguousarray(scales, np.float32).copy()
    _round_all(found.reshape(-1), zero_points.reshape(-1), rounding_table(form), form.smallest_scale)
    return found


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _round_all(scales, zeros, table, smallest):  # type: ignore[no-untyped-def]
    for i in range(scales.size):
        scales[i] = exact_scale(scales[i], table[zeros[i], 0], table[zeros[i], 1], smallest)


@numba.njit(inline="always", error_model="numpy")
def exact_scale(scale, splitter, limit, smallest):  # type: ignore[no-untyped-def]
    """The nearest scale that the scale dtype holds exactly together with its offset (`rounding_table`).

    Rounding to fewer digits is Veltkamp's splitting (Dekker 1971), exact in float32 arithmetic.
    """
    split = scale * splitter
    rounded = split - (split - scale)
    if abs(rounded) < limit:
        rounded = np.float32(np.rint(np.float64(scale) / smallest) * smallest)
        if rounded == 0:
            rounded = np.float32(max(smallest, 2.0**-126))
    return rounded
