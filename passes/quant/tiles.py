"""Shared by the kernels: a tile is one block of weights for LANES rows at once.

Tiles are stored [position in block, lane]. Loops over lanes vectorize, and each lane still adds up its
own numbers from first to last, so that a kernel gives the very bits of its plain numpy reference. Two things
keep the compiler from vectorizing them, at three times the cost: fewer lanes (16 are unrolled instead), and
numba's check for a division by zero (hence error_model="numpy").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lowbit.passes.quant.format import BlockFormat, Blocks, exact_scale, rounding_table
from lowbit.passes.quant.weights import as_bits

LANES = 32


@numba.njit(inline="always", error_model="numpy")
def load_tile(bits, shift, row, block, size, tile_bits):  # type: ignore[no-untyped-def]
    """Fill `tile_bits` (uint32 [size, LANES], a view of the float32 tile) from `bits` [rows, K].

    Lanes past the last row repeat it; positions past K are zero. Returns the number of real positions.
    """
    rows, k = bits.shape
    start = block * size
    filled = min(size, k - start)
    for lane in range(LANES):
        source = bits[min(row + lane, rows - 1), start : start + filled]
        for i in range(filled):
            tile_bits[i, lane] = np.uint32(source[i]) << shift
        for i in range(filled, size):
            tile_bits[i, lane] = 0
    return filled


@numba.njit(inline="always", error_model="numpy")
def look_up(zero, table, splitter, limit):  # type: ignore[no-untyped-def]
    """Per lane, the row of `rounding_table` for its zero point."""
    for lane in range(LANES):
        splitter[lane] = table[int(zero[lane]), 0]
        limit[lane] = table[int(zero[lane]), 1]


@numba.njit(inline="always", error_model="numpy")
def round_scales(scale, splitter, limit, smallest):  # type: ignore[no-untyped-def]
    """`exact_scale` in every lane, in place; only subnormal scales take its slow branch."""
    subnormal = False
    for lane in range(LANES):
        split = scale[lane] * splitter[lane]
        subnormal |= abs(split - (split - scale[lane])) < limit[lane]
    if subnormal:
        for lane in range(LANES):
            scale[lane] = exact_scale(scale[lane], splitter[lane], limit[lane], smallest)
    else:
        for lane in range(LANES):
            split = scale[lane] * splitter[lane]
            scale[lane] = split - (split - scale[lane])


@numba.njit(inline="always", error_model="numpy")
def store_codes(tile, filled, row, block, size, scale, zero, top, steps, codes, scales, zeros):  # type: ignore[no-untyped-def]
    """Round the tile to codes on the grid (`scale`, `zero`) per lane and write it out; padding is zero.

    `steps` is scratch, uint8 [size, LANES].
    """
    rows = codes.shape[0]
    start = block * size
    for i in range(filled):
        for lane in range(LANES):
            step = np.rint(tile[i, lane] / scale[lane]) + zero[lane]
            steps[i, lane] = np.uint8(min(max(step, np.float32(0)), top))
    for i in range(filled, size):
        for lane in range(LANES):
            steps[i, lane] = np.uint8(zero[lane])
    for lane in range(min(LANES, rows - row)):
        target = codes[row + lane, start : start + size]
        for i in range(size):
            target[i] = steps[i, lane]
        scales[row + lane, block] = scale[lane]
        zeros[row + lane, block] = zero[lane]


def run_kernel(
    kernel: Callable[..., None], rows: npt.NDArray[Any], form: BlockFormat, *options: float | npt.NDArray[Any]
) -> Blocks:
    """Call a tile kernel on rows [rows, K] and return what it filled in."""
    bits, shift = as_bits(rows)
    count, blocks = bits.shape[0], form.block_count(bits.shape[1])
    out = Blocks(
        codes=np.empty((count, blocks * form.block_size), np.uint8),
        scales=np.empty((count, blocks), np.float32),
        zero_points=np.empty((count, blocks), np.float32 if form.free else np.uint8),
    )
    grid = (form.block_size, np.float32(form.max_code), form.symmetric, rounding_table(form), form.smallest_scale)
    kernel(bits, np.uint32(shift), *grid, *options, out.codes, out.scales, out.zero_points)
    return out
