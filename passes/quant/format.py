"""Block quantization: what a code means, and which scales a file can hold exactly.

    weight = (code - zero_point) * scale

`code` is an integer in [0, 2^bits - 1]; `block_size` weights along K share one scale and one zero point, an integer of
the same range or any number. This is onnxruntime's MatMulNBits (com.microsoft operator documentation); MNN stores the
same grid as weight = (code - 2^(bits-1)) * scale + offset with offset = (2^(bits-1) - zero_point) * scale. Where zero
points are floats the offsets are what files hold, and a zero point is what follows: 2^(bits-1) - offset / scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numba
import numpy as np
import numpy.typing as npt

from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)

ScaleDtype = Literal["fp16", "fp32"]
ZeroPoint = Literal["integer", "float"]


@dataclass(frozen=True)
class BlockFormat:
    """How one weight [N, K] is stored: bits of a code, weights per scale, dtype of scales (and offsets), kind of zero point."""

    bits: int
    block_size: int
    symmetric: bool
    scale_dtype: ScaleDtype
    zero_point: ZeroPoint = "integer"

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1

    @property
    def free(self) -> bool:
        """Whether zero points are floats."""
        return self.zero_point == "float"

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
        zero_bits = blocks * scale_bits if self.free else 8 * math.ceil(blocks * self.zero_point_bits / 8)
        zero_bits = 0 if self.symmetric else zero_bits
        return (blocks * (self.block_size * self.bits + scale_bits) + zero_bits) / k


@dataclass
class Blocks:
    """A run of quantized rows.

    Attributes:
        codes: uint8 [rows, blocks * block_size]; the padding of a ragged last block holds its zero point.
        scales: float32 [rows, blocks].
        zero_points: uint8 [rows, blocks], or float32 where they are free.
    """

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float32]
    zero_points: npt.NDArray[Any]

    def dequantize(self, k: int) -> npt.NDArray[np.float32]:
        """The weights that these codes stand for, float32 [rows, k]."""
        return np.asarray(_dequantize(self.codes, self.scales, self.zero_points.astype(np.float32), k))


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _dequantize(codes, scales, zero_points, k):  # type: ignore[no-untyped-def]
    """(code - zero_point) * scale in float32, the first `k` of every row."""
    rows, blocks = scales.shape
    size = codes.shape[1] // blocks
    weights = np.empty((rows, k), np.float32)
    for row in range(rows):
        for block in range(blocks):
            scale, zero = scales[row, block], zero_points[row, block]
            for i in range(block * size, min((block + 1) * size, k)):
                weights[row, i] = (np.float32(codes[row, i]) - zero) * scale
    return weights


def rounding_table(form: BlockFormat) -> npt.NDArray[np.float32]:
    """What `exact_scale` needs to know per zero point: float32 [2^bits, 2] = (splitter, fixed-step limit).

    MNN stores scale and (2^(bits-1) - zero_point) * scale. With |2^(bits-1) - zero_point| = odd * 2^j and
    `odd` of k bits, the product is exact whenever the scale has at most precision - k significand bits
    (all of them when odd is 1). Below the limit the dtype is subnormal: a fixed step, not fixed digits. Offsets of
    free zero points are rounded on their own, and every row of the table is the same.
    """
    table = np.empty((form.max_code + 1, 2), np.float32)
    for zero_point in range(form.max_code + 1):
        odd = 0 if form.free else abs(form.middle - zero_point)
        while odd and odd % 2 == 0:
            odd //= 2
        keep = form.precision - (odd.bit_length() if odd > 1 else 0)
        table[zero_point] = (1 << (24 - keep)) + 1, form.smallest_scale * 2.0 ** (keep - 1)
    return table


def exact_grid(
    scales: npt.NDArray[np.float32], zero_points: npt.NDArray[Any], form: BlockFormat
) -> tuple[npt.NDArray[np.float32], npt.NDArray[Any]]:
    """The nearest scales and zero points that a file holds exactly, float32 [rows, blocks] and as in `Blocks`.

    Integer zero points stay as they are; free ones follow from their rounded offsets.
    """
    found = np.ascontiguousarray(scales, np.float32).copy()
    table, zeros = rounding_table(form), np.ascontiguousarray(zero_points, np.float32 if form.free else np.uint8)
    _round_all(found.reshape(-1), zeros.reshape(-1), table, form.smallest_scale)
    if form.free:
        zeros = np.float32(form.middle) - offsets_of(found, zeros, form).astype(np.float32) / found
    return found, zeros


def offsets_of(scales: npt.NDArray[np.float32], zero_points: npt.NDArray[Any], form: BlockFormat) -> npt.NDArray[Any]:
    """What a code of 2^(bits-1) stands for, [rows, blocks] in the scale dtype; too large ones become infinite."""
    offsets = (np.float32(form.middle) - zero_points.astype(np.float32)) * scales
    with np.errstate(over="ignore"):
        return offsets.astype(np.float16 if form.scale_dtype == "fp16" else np.float32)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _round_all(scales, zeros, table, smallest):  # type: ignore[no-untyped-def]
    for i in range(scales.size):
        row = min(max(int(zeros[i]), 0), len(table) - 1)
        scales[i] = exact_scale(scales[i], table[row, 0], table[row, 1], smallest)


@numba.njit(inline="always", error_model="numpy")
def exact_scale(scale, splitter, limit, smallest):  # type: ignore[no-untyped-def]
    """The nearest scale that the scale dtype holds exactly together with its offset (`rounding_table`).

    Rounding to fewer digits is Veltkamp's splitting (Dekker 1971), exact in float32 arithmetic.
    """
    rounded = exact_value(scale, splitter, limit, smallest)
    return rounded if rounded != 0 else np.float32(max(smallest, 2.0**-126))


@numba.njit(inline="always", error_model="numpy")
def exact_value(value, splitter, limit, smallest):  # type: ignore[no-untyped-def]
    """The nearest number of as many digits as `splitter` says, or, below `limit`, the nearest multiple of `smallest`."""
    split = value * splitter
    rounded = split - (split - value)
    if abs(rounded) < limit:
        rounded = np.float32(np.rint(np.float64(value) / smallest) * smallest)
    return rounded
