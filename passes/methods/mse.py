"""Search each block's scale and zero point for the least squared error of its weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lowbit.passes.methods.rtn import full_range
from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)
from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.free_grid import fit
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.tiles import LANES, load_tile, look_up, round_scales, run_kernel, store_codes

FACTORS = np.linspace(1.0, 0.4, 8, dtype=np.float32)
"""Shares of the full range that are tried; 1 is round to nearest, which the result is never worse than."""
HALF_STEP = np.float32(0.3 / 7)
"""Half the distance between two of FACTORS: how far to either side of the best one the second round looks."""
REFITS = 2
"""Least-squares scales for the codes of the best grid so far, tried after the search."""


class Mse(Method):
    """Clip the range where that lowers the mean squared error, block by block, without any data.

    Tries each of FACTORS with the zero point of the full range (symmetric: with both signs of the scale), then half a
    step to either side of the best one with the zero points next to it, then refits the best scale to its codes by least
    squares. Range search by squared error is OMSE of Choukroun et al. (arXiv:1902.06822); these candidates come
    within 1% of a grid of 729 (27 lower x 27 upper bounds) on heavy-tailed weights. Free zero points are fitted afterwards.
    """

    def quantize(self, rows: npt.NDArray[Any], form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        return search(rows, form, np.ones(rows.shape[1], np.float32))


def search(rows: npt.NDArray[Any], form: BlockFormat, importance: npt.NDArray[np.float32]) -> Blocks:
    """The grid of each block of `rows` [rows, K] that makes the sum of importance [K] * error^2 least, and its codes."""
    worth = np.asarray(importance, np.float32)
    found = run_kernel(_kernel, rows, replace(form, zero_point="integer"), worth)
    return fit(rows, found, form, worth) if form.free else found


@numba.njit(inline="always", error_model="numpy")
def _try(tile, worth, filled, scale, lowest, highest, error, best_scale, best_lowest, found, inverse):  # type: ignore[no-untyped-def]
    """Keep (scale, lowest) in every lane where its weighted squared error is below `error`; the last two are scratch."""
    for lane in range(LANES):
        found[lane] = 0
        inverse[lane] = np.float32(1) / scale[lane]
    for i in range(filled):
        for lane in range(LANES):
            w = tile[i, lane]
            step = min(max(np.rint(w * inverse[lane]), lowest[lane]), highest[lane])
            miss = step * scale[lane] - w
            found[lane] += miss * miss * worth[i]
    for lane in range(LANES):
        if found[lane] < error[lane]:
            error[lane] = found[lane]
            best_scale[lane] = scale[lane]
            best_lowest[lane] = lowest[lane]


@numba.njit(inline="always", error_model="numpy")
def _refit(tile, worth, filled, scale, lowest, highest, refitted, square, inverse):  # type: ignore[no-untyped-def]
    """Per lane, the scale of least squared error for the codes of grid (scale, lowest); the last two are scratch."""
    product = refitted
    for lane in range(LANES):
        product[lane] = 0
        square[lane] = 0
        inverse[lane] = np.float32(1) / scale[lane]
    for i in range(filled):
        for lane in range(LANES):
            w = tile[i, lane]
            step = min(max(np.rint(w * inverse[lane]), lowest[lane]), highest[lane])
            product[lane] += step * w * worth[i]
            square[lane] += step * step * worth[i]
    for lane in range(LANES):
        fitted = product[lane] / square[lane] if square[lane] > 0 else np.float32(0)
        refitted[lane] = fitted if fitted != 0 else scale[lane]


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _kernel(  # type: ignore[no-untyped-def]
    bits, shift, size, top, symmetric, table, smallest, importance, codes, scales, zeros
):
    for group in range(-(-bits.shape[0] // LANES)):
        tile_bits = np.empty((size, LANES), np.uint32)
        tile = tile_bits.view(np.float32)
        steps = np.empty((size, LANES), np.uint8)
        full, full_zero, scale, zero, coarse, best_scale, best_lowest = np.empty((7, LANES), np.float32)
        # steps from the zero point, the smallest and the largest that a code can say
        lowest, highest, error, found, inverse, splitter, limit = np.empty((7, LANES), np.float32)
        for block in range(scales.shape[1]):
            filled = load_tile(bits, shift, group * LANES, block, size, tile_bits)
            worth = importance[block * size : block * size + filled]
            full_range(tile, filled, top, symmetric, table, smallest, full, full_zero, splitter, limit)
            error[:] = np.inf
            for lane in range(LANES):
                lowest[lane] = -full_zero[lane]
                highest[lane] = top - full_zero[lane]
            for factor in FACTORS:
                for sign in range(1, -2 if symmetric else 0, -2):
                    for lane in range(LANES):
                        scale[lane] = full[lane] * (factor * np.float32(sign))
                    round_scales(scale, splitter, limit, smallest)
                    _try(tile, worth, filled, scale, lowest, highest, error, best_scale, best_lowest, found, inverse)
            coarse[:] = best_scale
            for move in range(-1, 0 if symmetric else 2, 2):
                for lane in range(LANES):
                    moved = full_zero[lane] if symmetric else full_zero[lane] + np.float32(move)
                    zero[lane] = min(max(moved, np.float32(0)), top)
                    lowest[lane] = -zero[lane]
                    highest[lane] = top - zero[lane]
                look_up(zero, table, splitter, limit)
                for side in range(-1, 2, 2):
                    for lane in range(LANES):
                        step = full[lane] * (HALF_STEP * np.float32(side))
                        scale[lane] = coarse[lane] + step
                    round_scales(scale, splitter, limit, smallest)
                    _try(tile, worth, filled, scale, lowest, highest, error, best_scale, best_lowest, found, inverse)
            for lane in range(LANES):
                lowest[lane] = best_lowest[lane]
                highest[lane] = top + lowest[lane]
                zero[lane] = -lowest[lane]
            look_up(zero, table, splitter, limit)
            for _ in range(REFITS):
                _refit(tile, worth, filled, best_scale, lowest, highest, scale, found, inverse)
                round_scales(scale, splitter, limit, smallest)
                _try(tile, worth, filled, scale, lowest, highest, error, best_scale, best_lowest, found, inverse)
            store_codes(tile, filled, group * LANES, block, size, best_scale, zero, top, steps, codes, scales, zeros)
