"""Round to nearest: the grid spans the block's smallest and largest weight."""

from __future__ import annotations

import numba
import numpy as np

from passes._blocks import BlockFormat, Blocks, exact_scale
from passes.methods._tiles import LANES, load_tile, run_kernel, store_codes
from passes.methods.base import Method


class Rtn(Method):
    """Round to nearest, the baseline of every paper (defined e.g. in GPTQ, arXiv:2210.17323, section 2).

    Asymmetric: the grid spans min(block, 0) to max(block, 0), so that zero stays zero. Symmetric: the
    weight of largest magnitude gets code 0, the one end that reaches 2^(bits-1) steps, whatever its sign
    (the scale takes the sign), as onnxruntime's own quantizer does.
    """

    def quantize(self, rows: np.ndarray, form: BlockFormat) -> Blocks:
        return run_kernel(_kernel, rows, form)


@numba.njit(inline="always")
def full_range(tile, filled, top, symmetric, table, smallest, scale, zero):  # type: ignore[no-untyped-def]
    """Per lane, the scale and zero point that just cover the tile; an all-zero block gets scale 1."""
    middle = np.float32((int(top) + 1) // 2)
    for lane in range(LANES):
        low = np.float32(0)
        high = np.float32(0)
        for i in range(filled):
            low = min(low, tile[i, lane])
            high = max(high, tile[i, lane])
        if symmetric:
            s = (-low if -low >= high else -high) / middle
            z = middle
        else:
            s = (high - low) / top
            z = np.rint(-low / s) if s > 0 else np.float32(0)
        if s == 0:
            s = np.float32(1)
        scale[lane] = exact_scale(s, table[int(z), 0], table[int(z), 1], smallest)
        zero[lane] = z


@numba.njit(parallel=True, cache=True, nogil=True)
def _kernel(bits, shift, size, top, symmetric, table, smallest, codes, scales, zeros):  # type: ignore[no-untyped-def]
    for group in numba.prange(-(-bits.shape[0] // LANES)):
        tile_bits = np.empty((size, LANES), np.uint32)
        tile = tile_bits.view(np.float32)
        scale = np.empty(LANES, np.float32)
        zero = np.empty(LANES, np.float32)
        for block in range(scales.shape[1]):
            filled = load_tile(bits, shift, group * LANES, block, size, tile_bits)
            full_range(tile, filled, top, symmetric, table, smallest, scale, zero)
            store_codes(tile, filled, group * LANES, block, size, scale, zero, top, codes, scales, zeros)
