"""Round to nearest: the grid spans the block's smallest and largest weight."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)
from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.free_grid import full_span
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.tiles import LANES, load_tile, look_up, round_scales, run_kernel, store_codes


class Rtn(Method):
    """Round to nearest, the baseline of every paper (defined e.g. in GPTQ, arXiv:2210.17323, section 2).

    Asymmetric: the grid spans min(block, 0) to max(block, 0), so that zero stays zero. Symmetric: the
    weight of largest magnitude gets code 0, the one end that reaches 2^(bits-1) steps, whatever its sign
    (the scale takes the sign), as onnxruntime's own quantizer does. Free zero points: from the smallest to the largest.
    """

    def quantize(self, rows: npt.NDArray[Any], form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        return full_span(rows, form) if form.free else run_kernel(_kernel, rows, form)


@numba.njit(inline="always", error_model="numpy")
def full_range(tile, filled, top, symmetric, table, smallest, scale, zero, splitter, limit):  # type: ignore[no-untyped-def]
    """Per lane, the scale and zero point that just cover the tile; an all-zero block gets scale 1.

    `splitter` and `limit` are scratch; they leave as `look_up` of `zero`.
    """
    middle = np.float32((int(top) + 1) // 2)
    low, high = scale, zero  # each lane's extremes lie where its results go
    low[:] = 0
    high[:] = 0
    for i in range(filled):
        for lane in range(LANES):
            low[lane] = min(low[lane], tile[i, lane])
            high[lane] = max(high[lane], tile[i, lane])
    for lane in range(LANES):
        if symmetric:
            s = (-low[lane] if -low[lane] >= high[lane] else -high[lane]) / middle
            z = middle
        else:
            s = (high[lane] - low[lane]) / top
            z = np.rint(-low[lane] / s) if s > 0 else np.float32(0)
        scale[lane] = s if s != 0 else np.float32(1)
        zero[lane] = z
    look_up(zero, table, splitter, limit)
    round_scales(scale, splitter, limit, smallest)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _kernel(bits, shift, size, top, symmetric, table, smallest, codes, scales, zeros):  # type: ignore[no-untyped-def]
    for group in range(-(-bits.shape[0] // LANES)):
        tile_bits = np.empty((size, LANES), np.uint32)
        tile = tile_bits.view(np.float32)
        steps = np.empty((size, LANES), np.uint8)
        scale, zero, splitter, limit = np.empty((4, LANES), np.float32)
        for block in range(scales.shape[1]):
            filled = load_tile(bits, shift, group * LANES, block, size, tile_bits)
            full_range(tile, filled, top, symmetric, table, smallest, scale, zero, splitter, limit)
            store_codes(tile, filled, group * LANES, block, size, scale, zero, top, steps, codes, scales, zeros)
