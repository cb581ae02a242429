"""Shared by the kernels: a tile is one block of weights for LANES rows at once.

Tiles are stored [position in block, lane]. Loops over lanes vectorize, and each lane still adds up its
own numbers from first to last, so that a kernel gives the very bits of its plain numpy reference.
"""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np

from passes._blocks import BlockFormat, Blocks, rounding_table
from passes._weights import as_bits

LANES = 16


@numba.njit(inline="always")
def load_tile(bits, shift, row, block, size, tile_bits):  # type: ignore[no-untyped-def]
    """Fill `tile_bits` (uint32 [size, LANES], a view of the float32 tile) from `bits` [rows, K].

    Lanes past the last row repeat it; positions past K are zero. Returns the number of real positions.
    """
    rows, k = bits.shape
    start = block * size
    filled = min(size, k - start)
    for lane in range(LANES):
        source = bits[min(row + lane, rows - 1)]
        for i in range(filled):
            tile_bits[i, lane] = np.uint32(source[start + i]) << shift
        for i in range(filled, size):
            tile_bits[i, lane] = 0
    return filled


@numba.njit(inline="always")
def store_codes(tile, filled, row, block, size, scale, zero, top, codes, scales, zeros):  # type: ignore[no-untyped-def]
    """Round the tile to codes on the grid (`scale`, `zero`) per lane and write it out; padding is zero."""
    rows = codes.shape[0]
    start = block * size
    for lane in range(min(LANES, rows - row)):
        s, z = scale[lane], zero[lane]
        for i in range(filled):
            step = np.rint(tile[i, lane] / s) + z
            codes[row + lane, start + i] = np.uint8(min(max(step, np.float32(0)), top))
        for i in range(filled, size):
            codes[row + lane, start + i] = np.uint8(z)
        scales[row + lane, block] = s
        zeros[row + lane, block] = np.uint8(z)


def run_kernel(kernel: Callable[..., None], rows: np.ndarray, form: BlockFormat, *options: float) -> Blocks:
    """Call a tile kernel on rows [rows, K] and return what it filled in."""
    bits, shift = as_bits(rows)
    count, blocks = bits.shape[0], form.block_count(bits.shape[1])
    out = Blocks(
        codes=np.empty((count, blocks * form.block_size), np.uint8),
        scales=np.empty((count, blocks), np.float32),
        zero_points=np.empty((count, blocks), np.uint8),
    )
    grid = (form.block_size, np.float32(form.max_code), form.symmetric, rounding_table(form), form.smallest_scale)
    kernel(bits, np.uint32(shift), *grid, *options, out.codes, out.scales, out.zero_points)
    return out
