"""Round one weight after the other and let the weights to come make up for the error."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import numba
import numpy as np
import numpy.typing as npt
from pydantic import Field

from lowbit.passes.methods.mse import search
from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)
from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method, needed


class Gptq(Method):
    """GPTQ (Frantar et al., arXiv:2210.17323), in the form without an inverse (QuIP, arXiv:2307.13304, theorem 6).

    Minimizes the layer's output error, tr(E H E^T) with E = W - dequantized and H the second moments of its inputs. The
    scale and zero point of a block are searched when its turn comes, for its weights as the errors before have moved them,
    each squared error weighted by the mean square of its input.
    """

    calibrated: ClassVar[bool] = True

    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the diagonal of H, as a share of its mean; ten times as much wherever H is not positive definite."""
    order: Literal["natural", "activation"] = "natural"
    """`activation`: weights of large inputs first; scales are then searched beforehand, so that blocks stay in place."""

    def quantize(self, rows: npt.NDArray[Any], form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        moments = needed(hessian)
        w = np.ascontiguousarray(rows, np.float32)
        if self.order == "activation":
            return self._ordered(w, form, moments)
        count, k = w.shape
        blocks, size = form.block_count(k), form.block_size
        feedback, importance = moments.feedback(self.damping), moments.diagonal
        codes = np.empty((count, blocks * size), np.uint8)
        scales, zeros = np.empty((count, blocks), np.float32), np.empty((count, blocks), np.float32 if form.free else np.uint8)
        errors = np.empty((count, k), np.float32)
        for block in range(blocks):
            here = slice(block * size, min((block + 1) * size, k))
            moved = errors[:, : here.start] @ feedback[: here.start, here]
            # where the block's weights will be if none of its own is rounded: what the grid has to cover
            ahead = w[:, here] + moved @ np.linalg.inv(feedback[here, here])
            grid = search(ahead, form, importance[here])
            scales[:, block], zeros[:, block] = grid.scales[:, 0], grid.zero_points[:, 0]
            width = here.stop - here.start
            codes[:, here.stop : (block + 1) * size] = grid.codes[:, width:]
            scale, zero = (np.repeat(part, width, axis=1) for part in (grid.scales, grid.zero_points))
            parts = codes[:, here], errors[:, here]
            _round_in_turn(w[:, here], w[:, here] + moved, feedback[here, here], scale, zero, form.max_code, *parts)
        return Blocks(codes, scales, zeros)

    def _ordered(self, w: npt.NDArray[np.float32], form: BlockFormat, moments: Hessian) -> Blocks:
        k, size = w.shape[1], form.block_size
        order, feedback = moments.order, moments.feedback(self.damping, ordered=True)
        grid = search(w, form, moments.diagonal)
        codes, errors, moved = np.empty_like(w, np.uint8), np.empty_like(w), w[:, order]
        for start in range(0, k, size):
            here = slice(start, min(start + size, k))
            block = order[here] // size
            target = moved[:, here] + errors[:, :start] @ feedback[:start, here]
            scale, zero = grid.scales[:, block], grid.zero_points[:, block]
            parts = codes[:, here], errors[:, here]
            _round_in_turn(moved[:, here], target, feedback[here, here], scale, zero, form.max_code, *parts)
        grid.codes[:, order] = codes
        return grid


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _round_in_turn(w, target, feedback, scale, zero, top, codes, errors):  # type: ignore[no-untyped-def]
    """Round `target` [rows, size] column by column, each error fed forward to the columns after it.

    Args:
        w: the weights before any feedback; `errors` gets w - dequantized.
        feedback: float32 [size, size], the columns' own part of `Hessian.feedback`.
        scale, zero: of each weight.
        codes, errors: filled in.
    """
    rows, size = w.shape
    moved = np.empty(size, np.float32)
    for row in range(rows):
        moved[:] = target[row]
        for i in range(size):
            s, z = scale[row, i], np.float32(zero[row, i])
            code = min(max(np.rint(moved[i] / s + z), np.float32(0)), np.float32(top))
            error = w[row, i] - (code - z) * s
            codes[row, i] = np.uint8(code)
            errors[row, i] = error
            # slices, since indices that start above zero cost a check each and do not vectorize
            later, shares = moved[i + 1 :], feedback[i, i + 1 :]
            for j in range(later.size):
                later[j] += error * shares[j]
