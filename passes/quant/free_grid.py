"""Shared by methods: grids whose zero points are floats, so that zero need not lie on them."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)
from lowbit.passes.quant.format import BlockFormat, Blocks, exact_grid, exact_scale, exact_value, rounding_table

ROUNDS = 8
"""Fits of a grid to its codes and of the codes to the grid; nearly all blocks stand still before."""


def on_grid(
    rows: npt.NDArray[Any], scales: npt.NDArray[np.float32], zero_points: npt.NDArray[Any], form: BlockFormat
) -> Blocks:
    """The nearest codes on free grids, float32 [rows, blocks], which are made exact first."""
    w = _tiles(rows, form)
    scales, zeros = exact_grid(scales, zero_points, form)
    codes = np.clip(np.rint(w / scales[..., None] + zeros[..., None]), 0, form.max_code)
    codes = codes.reshape(len(rows), -1)
    _pad(codes, zeros, rows.shape[1], form)
    return Blocks(codes.astype(np.uint8), scales, zeros)


def full_span(rows: npt.NDArray[Any], form: BlockFormat) -> Blocks:
    """Round to nearest between each block's smallest and largest weight; a block of equal weights is its offset."""
    w = _tiles(rows, form)
    low, high = w.min(-1), w.max(-1)
    scale = (high - low) / np.float32(form.max_code)
    scale = np.where(scale > 0, scale, np.float32(1))
    return on_grid(rows, scale, -low / scale, form)


def fit(rows: npt.NDArray[Any], start: Blocks, form: BlockFormat, importance: npt.NDArray[np.float32]) -> Blocks:
    """Lower the sum of importance [K] * error^2 of each block: fit scale and offset to the codes, then codes to them, in turn.

    Lloyd's algorithm (1982) on a grid of equal steps: linear regression, then the nearest codes. No round makes it worse.

    Args:
        rows: weights [rows, K].
        start: the grid to begin with, its zero points integers.
    """
    w = np.ascontiguousarray(rows, np.float32)
    found = Blocks(start.codes.copy(), start.scales.copy(), start.zero_points.astype(np.float32))
    found.scales, found.zero_points = exact_grid(found.scales, found.zero_points, form)
    worth = np.ascontiguousarray(importance, np.float32)
    _fit(
        w,
        worth,
        form.middle,
        form.max_code,
        rounding_table(form),
        form.smallest_scale,
        found.codes,
        found.scales,
        found.zero_points,
    )
    _pad(found.codes, found.zero_points, rows.shape[1], form)
    return found


def _tiles(rows: npt.NDArray[Any], form: BlockFormat) -> npt.NDArray[np.float32]:
    """Weights float32 [rows, blocks, size], a ragged end repeated."""
    missing = form.block_count(rows.shape[1]) * form.block_size - rows.shape[1]
    padded = np.pad(rows.astype(np.float32), ((0, 0), (0, missing)), mode="edge")
    return padded.reshape(len(rows), -1, form.block_size)


def _pad(codes: npt.NDArray[np.uint8], zeros: npt.NDArray[Any], k: int, form: BlockFormat) -> None:
    """Let the padding of a ragged end hold the code nearest to zero."""
    codes[:, k:] = np.clip(np.rint(zeros[:, -1:]), 0, form.max_code)


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _fit(w, worth, middle, top, table, smallest, codes, scales, zeros):  # type: ignore[no-untyped-def]
    rows, k = w.shape
    size = codes.shape[1] // scales.shape[1]
    draft = np.empty(size, np.float32)
    middle, top = np.float32(middle), np.float32(top)
    for row in range(rows):
        for block in range(scales.shape[1]):
            here = w[row, block * size : min((block + 1) * size, k)]
            mass = worth[block * size : min((block + 1) * size, k)]
            steps = codes[row, block * size : (block + 1) * size]
            error = np.float64(0)
            for i in range(here.size):
                miss = (np.float32(steps[i]) - zeros[row, block]) * scales[row, block] - here[i]
                error += mass[i] * miss * miss
            for _ in range(ROUNDS):
                # sums over weights: how much they count, code, code^2, weight, code * weight
                total, first, second, level, product = np.float64(0), np.float64(0), np.float64(0), np.float64(0), np.float64(0)
                for i in range(here.size):
                    code, m = np.float64(steps[i]) - middle, np.float64(mass[i])
                    total += m
                    first += m * code
                    second += m * code * code
                    level += m * here[i]
                    product += m * code * here[i]
                spread = total * second - first * first
                scale = scales[row, block]
                if spread > 1e-9 * total * second:
                    scale = np.float32((total * product - first * level) / spread)
                if scale <= 0 or total <= 0:
                    break
                scale = exact_scale(scale, table[0, 0], table[0, 1], smallest)
                offset = exact_value(np.float32((level - scale * first) / total), table[0, 0], table[0, 1], smallest)
                zero, found = middle - offset / scale, np.float64(0)
                for i in range(here.size):
                    draft[i] = min(max(np.rint(here[i] / scale + zero), np.float32(0)), top)
                    miss = (draft[i] - zero) * scale - here[i]
                    found += mass[i] * miss * miss
                if found >= error:
                    break
                error, scales[row, block], zeros[row, block] = found, scale, zero
                for i in range(here.size):
                    steps[i] = np.uint8(draft[i])
