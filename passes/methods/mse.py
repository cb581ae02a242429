"""Search each block's scale and zero point for the least squared error of its weights."""

from __future__ import annotations

import numba
import numpy as np

from passes._blocks import BlockFormat, Blocks, exact_scale
from passes.methods._tiles import LANES, load_tile, run_kernel, store_codes
from passes.methods.base import Method
from passes.methods.rtn import full_range

FACTORS = np.linspace(1.0, 0.4, 8, dtype=np.float32)
"""Shares of the full range that are tried; 1 is round to nearest, which the result is never worse than."""
REFITS = 2
"""Least-squares scales for the codes of the best grid so far, tried after the search."""


class Mse(Method):
    """Clip the range where that lowers the mean squared error, block by block, without any data.

    Tries each of FACTORS with the zero point of the full range and its two neighbours (symmetric: with
    both signs of the scale), then refits the best scale to its codes by least squares. Range search by
    squared error is OMSE of Choukroun et al. (arXiv:1902.06822); 26 candidates come within 0.5% of
    a grid of 729 (27 lower x 27 upper bounds) on Gaussian and Student-t weights.
    """

    def quantize(self, rows: np.ndarray, form: BlockFormat) -> Blocks:
        return run_kernel(_kernel, rows, form)


@numba.njit(inline="always")
def _try(tile, filled, top, scale, zero, error, best_scale, best_zero):  # type: ignore[no-untyped-def]
    """Keep (scale, zero) in every lane where its squared error is below `error`."""
    found = np.zeros(LANES, np.float32)
    inverse = np.float32(1) / scale
    for i in range(filled):
        for lane in range(LANES):
            w = tile[i, lane]
            step = min(max(np.rint(w * inverse[lane]), -zero[lane]), top - zero[lane])
            miss = step * scale[lane] - w
            found[lane] += miss * miss
    for lane in range(LANES):
        if found[lane] < error[lane]:
            error[lane] = found[lane]
            best_scale[lane] = scale[lane]
            best_zero[lane] = zero[lane]


@numba.njit(inline="always")
def _refit(tile, filled, top, scale, zero, refitted):  # type: ignore[no-untyped-def]
    """Per lane, the scale of least squared error for the codes of grid (scale, zero)."""
    product = np.zeros(LANES, np.float32)
    square = np.zeros(LANES, np.float32)
    inverse = np.float32(1) / scale
    for i in range(filled):
        for lane in range(LANES):
            w = tile[i, lane]
            step = min(max(np.rint(w * inverse[lane]), -zero[lane]), top - zero[lane])
            product[lane] += step * w
            square[lane] += step * step
    for lane in range(LANES):
        found = product[lane] / square[lane] if square[lane] > 0 else np.float32(0)
        refitted[lane] = found if found != 0 else scale[lane]


@numba.njit(parallel=True, cache=True, nogil=True)
def _kernel(bits, shift, size, top, symmetric, table, smallest, codes, scales, zeros):  # type: ignore[no-untyped-def]
    for group in numba.prange(-(-bits.shape[0] // LANES)):
        tile_bits = np.empty((size, LANES), np.uint32)
        tile = tile_bits.view(np.float32)
        full, full_zero, scale, zero, best_scale, best_zero, error = np.empty((7, LANES), np.float32)
        for block in range(scales.shape[1]):
            filled = load_tile(bits, shift, group * LANES, block, size, tile_bits)
            full_range(tile, filled, top, symmetric, table, smallest, full, full_zero)
            error[:] = np.inf
            for factor in FACTORS:
                for move in range(-1, 2):
                    if symmetric and move == 0:
                        continue
                    for lane in range(LANES):
                        s = full[lane] * factor
                        z = full_zero[lane]
                        if symmetric:
                            s *= np.float32(-move)
                        else:
                            z = min(max(z + np.float32(move), np.float32(0)), top)
                        zero[lane] = z
                        scale[lane] = exact_scale(s, table[int(z), 0], table[int(z), 1], smallest)
                    _try(tile, filled, top, scale, zero, error, best_scale, best_zero)
            for _ in range(REFITS):
                _refit(tile, filled, top, best_scale, best_zero, scale)
                zero[:] = best_zero
                for lane in range(LANES):
                    z = int(zero[lane])
                    scale[lane] = exact_scale(scale[lane], table[z, 0], table[z, 1], smallest)
                _try(tile, filled, top, scale, zero, error, best_scale, best_zero)
            store_codes(tile, filled, group * LANES, block, size, best_scale, best_zero, top, codes, scales, zeros)
