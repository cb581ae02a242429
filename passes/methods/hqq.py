"""Half-quadratic quantization: move the grid so that few large errors are left."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from lowbit.passes.methods.rtn import full_range
from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)
from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.free_grid import on_grid
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.tiles import LANES, load_tile, look_up, round_scales, run_kernel, store_codes


class Hqq(Method):
    """HQQ (Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/), calibration-free.

    Minimizes sum |W - dequantize(quantize(W))|^p by half-quadratic splitting: a
    generalized soft threshold for the error, a closed form for the grid. The paper moves a float zero point
    under a fixed scale. An integer zero point hardly ever moves, so here the closed form of the scale follows in every
    iteration, and that of the zero point is rounded where it must be.
    """

    p: float = 0.7
    """The norm, below 1 to favor few large errors over many small ones."""
    beta: float = 10.0
    """Weight of the quadratic coupling, multiplied by `kappa` on every iteration."""
    kappa: float = 1.01
    iterations: int = 20

    def quantize(self, rows: npt.NDArray[Any], form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        found = run_kernel(_kernel, rows, form, self.p, self.beta, self.kappa, self.iterations, form.free)
        return on_grid(rows, found.scales, found.zero_points, form) if form.free else found


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _kernel(  # type: ignore[no-untyped-def]
    bits, shift, size, top, symmetric, table, smallest, p, beta0, kappa, iterations, free, codes, scales, zeros
):
    for group in range(-(-bits.shape[0] // LANES)):
        tile_bits = np.empty((size, LANES), np.uint32)
        tile = tile_bits.view(np.float32)
        steps = np.empty((size, LANES), np.uint8)
        scale, zero, part, shifts, product, square, splitter, limit = np.empty((8, LANES), np.float32)
        for block in range(scales.shape[1]):
            filled = load_tile(bits, shift, group * LANES, block, size, tile_bits)
            full_range(tile, filled, top, symmetric, table, smallest, scale, zero, splitter, limit)
            beta = beta0
            for _ in range(iterations):
                shifts[:] = 0
                product[:] = 0
                square[:] = 0
                for lane in range(LANES):
                    part[lane] = zero[lane] - np.rint(zero[lane])  # nothing unless it is free
                for i in range(filled):
                    for lane in range(LANES):
                        w, s, z = tile[i, lane], scale[lane], zero[lane]
                        code = min(max(np.rint(w / s + part[lane]) + (z - part[lane]), np.float32(0)), top)
                        error = np.float64(w - (code - z) * s)
                        magnitude = abs(error)
                        if magnitude > 0:  # generalized soft threshold of the p-norm
                            magnitude = max(magnitude - magnitude ** (p - 1) / beta, 0.0)
                        target = w - np.float32(np.copysign(magnitude, error))
                        shifts[lane] += code - target / s
                        product[lane] += (code - z) * target
                        square[lane] += (code - z) * (code - z)
                for lane in range(LANES):
                    if not symmetric:
                        mean = shifts[lane] / np.float32(filled)
                        zero[lane] = min(max(mean if free else np.rint(mean), np.float32(0)), top)
                    if product[lane] * scale[lane] > 0:
                        scale[lane] = product[lane] / square[lane]
                beta *= kappa
            look_up(zero, table, splitter, limit)
            round_scales(scale, splitter, limit, smallest)
            store_codes(tile, filled, group * LANES, block, size, scale, zero, top, steps, codes, scales, zeros)
