"""Learn which way to round, and how far to clip, by the signs of gradients."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from lowbit.passes.quant.format import BlockFormat, Blocks, exact_grid
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method, needed

Floats = npt.NDArray[np.float32]


class Signround(Method):
    """SignRound, the algorithm of AutoRound (Cheng et al., arXiv:2309.05516), on the layer's output error.

    An offset in [-1/2, 1/2] for each weight and clipping factors in [0, 1] for both ends of each block's range are moved by
    the sign of their gradients, by steps that fall linearly to zero; the best iteration of each row is kept. The
    paper's loss is a block's output error; here it is tr(E H E^T) of one layer, so that rows are independent.
    """

    calibrated: ClassVar[bool] = True

    iterations: Annotated[int, Field(ge=1)] = 200
    damping: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Added to the diagonal of H, as a share of its mean."""

    def quantize(self, rows: npt.NDArray[Any], form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        moments = needed(hessian)
        w = np.ascontiguousarray(rows, np.float32)
        count, k = w.shape
        blocks, size = form.block_count(k), form.block_size
        damping = np.float32(self.damping * float(moments.diagonal.mean()))
        padded = np.zeros((count, blocks * size), np.float32)
        padded[:, :k] = w
        tiles = padded.reshape(count, blocks, size)
        low, high = np.minimum(tiles.min(-1), 0), np.maximum(tiles.max(-1), 0)
        offset = np.zeros_like(padded)
        ends = np.ones((2, count, blocks), np.float32)  # of the lower and the upper end of the range
        best, best_error = _round(tiles, offset, low, high, ends, form), np.full(count, np.inf, np.float32)
        for step in range(self.iterations + 1):
            tried = _round(tiles, offset, low, high, ends, form)
            errors = w - tried.dequantize(k)
            pull = errors @ moments.matrix + damping * errors
            loss = (errors * pull).sum(1)
            better = loss < best_error
            best_error[better] = loss[better]
            for old, new in ((best.codes, tried.codes), (best.scales, tried.scales), (best.zero_points, tried.zero_points)):
                old[better] = new[better]
            rate = np.float32((1 - step / self.iterations) / self.iterations)
            _move(tiles, pull, tried, offset, low, high, ends, form, rate)
        return best


def _move(
    tiles: Floats, pull: Floats, tried: Blocks, offset: Floats, low: Floats, high: Floats, ends: Floats,
    form: BlockFormat, rate: np.float32,
) -> None:  # fmt: skip
    """A step against the signs of the gradients of offsets and ends, in place; `pull` is E H, minus half the one of W'."""
    count, blocks, size = tiles.shape
    away = np.zeros((count, blocks * size), np.float32)
    away[:, : pull.shape[1]] = pull
    away = away.reshape(tiles.shape)
    scale, zero = tried.scales[..., None], tried.zero_points[..., None].astype(np.float32)
    codes = tried.codes.reshape(tiles.shape).astype(np.float32)
    wanted = np.rint(tiles / scale + offset.reshape(tiles.shape) + zero)
    inside = (wanted >= 0) & (wanted <= form.max_code)
    offset += rate * np.sign(away * scale * inside).reshape(offset.shape)
    np.clip(offset, -0.5, 0.5, out=offset)
    # W' = (code - zero) * scale, the code moving against the scale, and with a free zero, as far as it is not clipped
    by_scale = (away * (codes - zero - inside * tiles / scale)).sum(-1)
    by_low = -by_scale * low
    if form.free:
        by_scale += (away * ~inside * zero).sum(-1)
        by_low = -by_scale * low + form.max_code * low * (away * ~inside).sum(-1)
    if form.symmetric:
        ends += rate * np.sign(by_scale * tried.scales)
    else:
        ends[0] += rate * np.sign(by_low)
        ends[1] += rate * np.sign(by_scale * high)
    np.clip(ends, 0, 1, out=ends)


def _round(
    tiles: Floats,
    offset: Floats,
    low: Floats,
    high: Floats,
    ends: Floats,
    form: BlockFormat,
) -> Blocks:
    """The codes for offsets and clipped ranges; padding and blocks of zeros hold the zero point."""
    if form.symmetric:
        scale = np.where(-low >= high, -low, -high) / np.float32(form.middle) * ends[0]
        zero = np.full(scale.shape, form.middle, np.float32)
    else:
        scale = (high * ends[1] - low * ends[0]) / np.float32(form.max_code)
        with np.errstate(divide="ignore", invalid="ignore"):
            zero = np.where(scale > 0, -low * ends[0] / scale, 0).clip(0, form.max_code)
        zero = zero if form.free else np.rint(zero)
    scale = np.where(scale == 0, np.float32(1), scale).astype(np.float32)
    scale, zeros = exact_grid(scale, zero, form)
    part = zeros - np.rint(zeros)  # nothing unless it is free
    codes = np.rint(tiles / scale[..., None] + offset.reshape(tiles.shape) + part[..., None]) + np.rint(zeros)[..., None]
    codes = np.where(tiles == 0, np.rint(zeros)[..., None], np.clip(codes, 0, form.max_code))
    return Blocks(codes.reshape(len(tiles), -1).astype(np.uint8), scale, zeros)
