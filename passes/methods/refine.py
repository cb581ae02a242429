"""Descend on codes, scales and zero points after another method, block by block, until the output error is least."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numba
import numpy as np
import numpy.typing as npt
from pydantic import Field

from lowbit.passes.methods.gptq import Gptq
from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)
from lowbit.passes.quant.format import BlockFormat, Blocks, exact_scale, exact_value, rounding_table
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method, needed
from lowbit.passes.registry import MethodChoice


class Refine(Method):
    """Block coordinate descent on tr(E H E^T), E = W - dequantized: no step makes it larger.

    A method that rounds once, like GPTQ, never comes back to a block. Here each block is visited again with the errors of all
    others as they are: its scale is refitted by least squares (scales are free parameters, as in Behdin et al.'s
    QuantEase, arXiv:2309.01885, codes are), then its codes move one after the other to where the error is least, and
    the neighboring zero points are tried the same way; a free zero point is refitted together with the scale.
    """

    calibrated: ClassVar[bool] = True

    after: MethodChoice = Gptq()
    """The method that makes the first codes."""
    sweeps: Annotated[int, Field(ge=1)] = 4
    """How often every block is visited."""
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the diagonal of H, as a share of its mean: keeps rarely used inputs from being traded away."""

    def quantize(self, rows: npt.NDArray[Any], form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        moments = needed(hessian)
        found = self.after.quantize(rows, form, moments)
        k, size = rows.shape[1], form.block_size
        damping = np.float32(self.damping * float(moments.diagonal.mean()))
        errors = rows.astype(np.float32) - found.dequantize(k)
        pull = errors @ moments.matrix + damping * errors
        for _ in range(self.sweeps):
            for block in range(form.block_count(k)):
                here = slice(block * size, min((block + 1) * size, k))
                own = moments.matrix[here, here] + damping * np.eye(here.stop - here.start, dtype=np.float32)
                moved = np.zeros((len(rows), here.stop - here.start), np.float32)
                codes = found.codes[:, block * size : (block + 1) * size]
                _descend(
                    pull[:, here], own, form.max_code, form.symmetric, form.free, rounding_table(form), form.smallest_scale,
                    codes, found.scales[:, block], found.zero_points[:, block], moved,
                )  # fmt: skip
                pull -= moved @ moments.matrix[here]
                pull[:, here] -= damping * moved
        return found


@numba.njit(cache=True, nogil=True, error_model="numpy")
def _descend(pull, own, top, symmetric, free, table, smallest, codes, scales, zeros, moved):  # type: ignore[no-untyped-def]
    """Lower the error of one block in every row.

    A weight is step * scale + offset: steps count from the zero point and offsets are nothing, or, where zero points are
    free, steps count from the middle code.

    Args:
        pull: float32 [rows, width], E H of the block's columns.
        own: float32 [width, width], the block's part of H.
        codes, scales, zeros: of the block, changed in place; codes [rows, size], those past `width` hold the zero point.
        moved: float32 [rows, width], zeros; gets how far each dequantized weight has moved.
    """
    rows, width = pull.shape
    steps, best_steps, draft, spread, flat = np.empty((5, width), np.float32)
    middle = np.float32((top + 1) // 2)
    flat[:] = 0
    for i in range(width):
        flat += own[i]
    for row in range(rows):
        old_scale, old_zero, old_offset = scales[row], np.float32(zeros[row]), np.float32(0)
        if free:
            old_offset = exact_value((middle - old_zero) * old_scale, table[0, 0], table[0, 1], smallest)
            old_zero = middle
        best_gain, best_scale, best_zero, best_offset = np.float64(0), old_scale, old_zero, old_offset
        for shift in range(0 if symmetric or free else -1, 1 if symmetric or free else 2):
            zero = old_zero + np.float32(shift)
            if zero < 0 or zero > top:
                continue
            draft[:] = pull[row]
            # the codes stay for now, so another zero point moves every weight of the block by a step
            scale = exact_scale(old_scale, table[int(zero), 0], table[int(zero), 1], smallest)
            gain = np.float64(0)
            for i in range(width):
                code = np.float32(codes[row, i])
                steps[i] = code - zero
                gain += _move(draft, own, i, steps[i] * scale - (code - old_zero) * old_scale)
            offset = old_offset
            if free:
                scale, offset, better = _refit_both(draft, own, steps, spread, flat, scale, offset, table, smallest)
            else:
                scale, better = _refit(draft, own, steps, spread, scale, zero, table, smallest)
            gain += better + _reround(draft, own, steps, scale, -zero, np.float32(top) - zero)
            if gain > best_gain:
                best_gain, best_scale, best_zero, best_offset = gain, scale, zero, offset
                best_steps[:] = steps
        if best_gain <= 0:
            continue
        for i in range(width):
            before = (np.float32(codes[row, i]) - old_zero) * old_scale + old_offset
            moved[row, i] = best_steps[i] * best_scale + best_offset - before
            codes[row, i] = np.uint8(best_steps[i] + best_zero)
        if free:
            best_zero = middle - best_offset / best_scale
        for i in range(width, codes.shape[1]):
            codes[row, i] = np.uint8(min(max(np.rint(best_zero), np.float32(0)), np.float32(top)))
        scales[row], zeros[row] = best_scale, best_zero


@numba.njit(inline="always", error_model="numpy")
def _move(pull, own, i, move):  # type: ignore[no-untyped-def]
    """Move weight `i`, update `pull` and return by how much the error falls."""
    if move == 0:
        return np.float64(0)
    gain = np.float64(2 * move * pull[i] - move * move * own[i, i])
    shares = own[i]
    for j in range(pull.size):
        pull[j] -= move * shares[j]
    return gain


@numba.njit(inline="always", error_model="numpy")
def _refit(pull, own, steps, spread, scale, zero, table, smallest):  # type: ignore[no-untyped-def]
    """The scale of least error for `steps`, if it is better, and by how much the error falls; `spread` is scratch."""
    _spread(own, steps, spread)
    product, square = np.float32(0), np.float32(0)
    for i in range(steps.size):
        product += steps[i] * pull[i]
        square += steps[i] * spread[i]
    if square <= 0:
        return scale, np.float64(0)
    fitted = exact_scale(scale + product / square, table[int(zero), 0], table[int(zero), 1], smallest)
    change = fitted - scale
    gain = np.float64(2 * change * product - change * change * square)
    if fitted * scale <= 0 or gain <= 0:
        return scale, np.float64(0)
    for j in range(steps.size):
        pull[j] -= change * spread[j]
    return fitted, gain


@numba.njit(inline="always", error_model="numpy")
def _refit_both(pull, own, steps, spread, flat, scale, offset, table, smallest):  # type: ignore[no-untyped-def]
    """`_refit` of scale and offset at once, two equations; `flat` is own times ones."""
    _spread(own, steps, spread)
    product, square, level, cross, total = np.float64(0), np.float64(0), np.float64(0), np.float64(0), np.float64(0)
    for i in range(steps.size):
        product += steps[i] * pull[i]
        square += steps[i] * spread[i]
        level += pull[i]
        cross += spread[i]
        total += flat[i]
    determinant = square * total - cross * cross
    if determinant <= 1e-9 * square * total:
        return scale, offset, np.float64(0)
    fitted = scale + np.float32((product * total - level * cross) / determinant)
    fitted = exact_scale(fitted, table[0, 0], table[0, 1], smallest)
    stretch = fitted - scale
    shifted = exact_value(offset + np.float32((level - stretch * cross) / total), table[0, 0], table[0, 1], smallest)
    shift = shifted - offset
    gain = 2 * (stretch * product + shift * level)
    gain -= stretch * stretch * square + 2 * stretch * shift * cross + shift * shift * total
    if fitted * scale <= 0 or gain <= 0:
        return scale, offset, np.float64(0)
    for j in range(steps.size):
        pull[j] -= stretch * spread[j] + shift * flat[j]
    return fitted, shifted, gain


@numba.njit(inline="always", error_model="numpy")
def _spread(own, steps, spread):  # type: ignore[no-untyped-def]
    """Set `spread` to own times steps."""
    spread[:] = 0
    for i in range(steps.size):
        if steps[i] != 0:
            shares = own[i]
            for j in range(steps.size):
                spread[j] += steps[i] * shares[j]


@numba.njit(inline="always", error_model="numpy")
def _reround(pull, own, steps, scale, lowest, highest):  # type: ignore[no-untyped-def]
    """Let each step move to where the error is least, the others as they are; by how much the error falls."""
    gain = np.float64(0)
    for i in range(steps.size):
        wanted = steps[i] + pull[i] / (own[i, i] * scale)
        step = min(max(np.rint(wanted), lowest), highest)
        gain += _move(pull, own, i, (step - steps[i]) * scale)
        steps[i] = step
    return gain
