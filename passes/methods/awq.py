"""Clip each block's weights as far as that lowers the block's share of the output error."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method, needed


class Awq(Method):
    """AWQ's clipping (Lin et al., arXiv:2306.00978, and its reference code, auto_clip): no weight makes up for another's error.

    Each block is clipped to shares of its largest magnitude, rounded to nearest, and the share of least output error is
    kept. The other half of AWQ, the scales of input channels, is the pass `fold_channel_scales`.
    """

    calibrated: ClassVar[bool] = True

    shares: Annotated[int, Field(ge=1)] = 10
    """How many shares are tried, from 1 down to just above `least`."""
    least: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def quantize(self, rows: np.ndarray, form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        moments = needed(hessian)
        w = np.ascontiguousarray(rows, np.float32)
        count, k = w.shape
        size, blocks = form.block_size, form.block_count(k)
        places = [slice(block * size, min((block + 1) * size, k)) for block in range(blocks)]
        largest = np.stack([np.abs(w[:, here]).max(1) for here in places], 1)
        best, best_error = Rtn().quantize(w, form), np.full((count, blocks), np.inf)
        for i in range(self.shares):
            limit = np.repeat(largest * np.float32(1 - (1 - self.least) * i / self.shares), size, 1)[:, :k]
            found = Rtn().quantize(np.clip(w, -limit, limit), form)
            away = found.dequantize(k) - w
            errors = [((away[:, here] @ moments.matrix[here, here]) * away[:, here]).sum(1) for here in places]
            better = np.stack(errors, 1) < best_error
            best_error = np.where(better, np.stack(errors, 1), best_error)
            best.scales[better], best.zero_points[better] = found.scales[better], found.zero_points[better]
            codes = np.repeat(better, size, 1)
            best.codes[codes] = found.codes[codes]
        return best
