"""A weight that is to be quantized: everything about it is known, except its bytes.

Passes put these into the graph; nothing is computed until the bytes are asked for. So a plan costs no
reading, and whoever writes the file may compute one weight at a time and remember it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from lowbit.passes.base import Pass, PassError
from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)
from lowbit.passes.quant.format import BlockFormat, Blocks, offsets_of
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.pack import pack_codes, pack_lsb
from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.weights import Weight, as_bits
from lowbit.passes.registry import word_of


@dataclass(frozen=True)
class Chunk:
    """Some rows of a quantized weight, packed as the ONNX file holds them, and their squared error."""

    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[Any]
    zero_points: npt.NDArray[Any] | None
    offsets: npt.NDArray[Any] | None
    squared_error: float
    square: float


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """One weight [N, K], how it is to be quantized, and what that gives.

    Attributes:
        name: the layer's name in the checkpoint.
        source: the float weight.
        form: bits, block size, symmetry, scale dtype.
        method: how codes are chosen.
        hessian: second moments of the layer's inputs, for a calibrated method; known once those were looked at.
        target: rows of the source -> what their codes shall come close to, both [rows, K], where that is another weight.
        training: the pass that wants its codes trained afterwards.
    """

    name: str
    source: Weight
    form: BlockFormat
    method: Method
    hessian: Hessian | None = None
    target: Callable[[npt.NDArray[Any]], npt.NDArray[np.float32]] | None = None
    training: Pass | None = None

    @property
    def method_name(self) -> str:
        return word_of(self.method)

    @property
    def made_by(self) -> str:
        """The method that chooses the codes, and the pass that trains them."""
        return self.method_name if self.training is None else f"{self.method_name} + {word_of(self.training)}"

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], int]]:
        """Shape and ONNX dtype of each stored part: codes, scales and, unless symmetric, zero_points or offsets."""
        n, k = self.source.shape
        form, blocks = self.form, self.form.block_count(k)
        padded = blocks * form.block_size
        codes = (n, 3, padded // 8) if form.bits == 3 else (n, blocks, form.block_size * form.bits // 8)
        scale = TensorProto.FLOAT16 if form.scale_dtype == "fp16" else TensorProto.FLOAT
        parts = {"codes": (codes, TensorProto.UINT8), "scales": ((n, blocks), scale)}
        if form.free:
            parts["offsets"] = parts["scales"]
        elif not form.symmetric:
            parts["zero_points"] = (n, -(-blocks * form.zero_point_bits // 8)), TensorProto.UINT8
        return parts

    @cached_property
    def parts(self) -> dict[str, Part]:
        return {name: Part(self, name, *spec) for name, spec in self.shapes.items()}

    def chunks(self) -> Iterator[Chunk]:
        """Quantize from the first row to the last, a few megabytes of the source at a time, on every core.

        Raises:
            PassError: a weight is NaN or infinite, or too large for the scale dtype.
        """
        return in_order(self.quantize, self.source.chunks())

    def quantize(self, piece: tuple[int, npt.NDArray[Any]]) -> Chunk:
        """What the file holds of some rows of the source, `(start, rows)`; raises as `chunks` does."""
        start, rows = piece
        bits, shift = as_bits(rows)
        if not all_finite(bits, np.uint32(shift)):
            wide = rows.astype(np.float32)
            row, column = np.argwhere(~np.isfinite(wide))[0]
            raise PassError(
                f"{self.name}: weight [{start + row}, {column}] is {wide[row, column]}. Only finite weights "
                "can be quantized; the checkpoint is damaged or its training diverged."
            )
        wanted = rows if self.target is None else self.target(rows)
        return self.chunk(start, rows, self.method.quantize(wanted, self.form, self.hessian))

    def chunk(self, start: int, rows: npt.NDArray[Any], blocks: Blocks) -> Chunk:
        """What the file holds of `rows`, the first of them row `start`, quantized to `blocks`.

        Raises:
            PassError: a scale or an offset is too large for the scale dtype.
        """
        form = self.form
        offsets = offsets_of(blocks.scales, blocks.zero_points, form) if form.free else None
        beyond = offsets is not None and not np.isfinite(offsets).all()
        if beyond or np.abs(blocks.scales).max(initial=0) > form.largest_scale:
            raise PassError(
                f"{self.name}: weights in rows {start} to {start + len(rows)} need scales beyond "
                f"{form.scale_dtype}; set scale_dtype: fp32."
            )
        bits, shift = as_bits(rows)
        error, square = squared_error(bits, np.uint32(shift), blocks.codes, blocks.scales, blocks.zero_points)
        zeros = None if form.symmetric or form.free else pack_lsb(blocks.zero_points, form.zero_point_bits)
        scales = blocks.scales.astype(np.float16) if form.scale_dtype == "fp16" else blocks.scales
        return Chunk(pack_codes(blocks.codes, form.bits), scales, zeros, offsets, error, square)


class Part(Weight):
    """The codes, scales, zero points or offsets of a quantized weight, as a constant of the graph."""

    def __init__(self, of: QuantizedWeight, part: str, shape: tuple[int, ...], onnx_dtype: int) -> None:
        super().__init__(shape, onnx_dtype)
        self.of = of
        self.part = part

    def load(self) -> npt.NDArray[Any]:
        """Quantize now, in memory; small graphs and tests do."""
        dtype = onnx.helper.tensor_dtype_to_np_dtype(self.onnx_dtype)
        found = np.concatenate([getattr(chunk, self.part) for chunk in self.of.chunks()])
        return found.reshape(self.shape).astype(dtype, copy=False)

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self.load()[start:stop]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def all_finite(bits, shift):  # type: ignore[no-untyped-def]
    """Whether no float32 of `bits << shift`, [rows, K], is NaN or infinite (all exponent bits set)."""
    exponent = np.uint32(0x7F800000)
    bad = 0
    for row in range(bits.shape[0]):
        for i in range(bits.shape[1]):
            bad += ((np.uint32(bits[row, i]) << shift) & exponent) == exponent
    return bad == 0


@numba.njit(cache=True, nogil=True, error_model="numpy")
def squared_error(bits, shift, codes, scales, zeros):  # type: ignore[no-untyped-def]
    """Sums of (dequantized - weight)^2 and of weight^2, differences in float32, added up in float64."""
    rows, k = bits.shape
    size = codes.shape[1] // scales.shape[1]
    sums, squares = np.zeros((rows, 32), np.float64), np.zeros((rows, 32), np.float64)
    for row in range(rows):
        wide = np.empty(k, np.uint32)
        miss = wide.view(np.float32)
        source, total, square = bits[row], sums[row], squares[row]
        for i in range(k):
            wide[i] = np.uint32(source[i]) << shift
        for start in range(0, k, 32):
            here = miss[start : start + 32]
            for i in range(here.size):
                square[i] += np.float64(here[i]) * np.float64(here[i])
        for block in range(scales.shape[1]):
            # slices, since indices that start above zero cost a check each and do not vectorize
            here, steps = miss[block * size : block * size + size], codes[row, block * size : block * size + size]
            scale, zero = scales[row, block], np.float32(zeros[row, block])
            for i in range(here.size):
                here[i] -= (np.float32(steps[i]) - zero) * scale
        for start in range(0, k, 32):
            here = miss[start : start + 32]
            for i in range(here.size):
                total[i] += np.float64(here[i]) * np.float64(here[i])
    return sums.sum(), squares.sum()
