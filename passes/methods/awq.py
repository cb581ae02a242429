"""Clip each block's weights as far as that lowers its share of the output error; search the scales of input channels."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import numpy.typing as npt
from pydantic import Field

from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method, needed
from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.scaled_weight import ChannelScale

SMALLEST = np.float32(1e-4)
"""A channel is taken to be at least this large on average, so that one that is always zero gets a finite scale."""


class Awq(Method):
    """AWQ's clipping (Lin et al., arXiv:2306.00978, and its reference code, auto_clip): no weight makes up for another's error.

    Each block is clipped to shares of its largest magnitude, rounded to nearest, and the share of least output error is
    kept. The other half of AWQ, the scales of input channels, is the pass `fold_channel_scales`.
    """

    calibrated: ClassVar[bool] = True

    shares: Annotated[int, Field(ge=1)] = 10
    """How many shares are tried, from 1 down to just above `least`."""
    least: Annotated[float, Field(gt=0, lt=1)] = 0.5

    def quantize(self, rows: npt.NDArray[Any], form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        moments = needed(hessian)
        w = np.ascontiguousarray(rows, np.float32)
        count, k = w.shape
        size, blocks = form.block_size, form.block_count(k)
        places = [slice(block * size, min((block + 1) * size, k)) for block in range(blocks)]
        largest = np.stack([np.abs(w[:, here]).max(1) for here in places], 1)
        best, best_error = Rtn().quantize(w, form), np.full((count, blocks), np.inf)
        for i in range(self.shares):
            limit = np.repeat(largest * np.float32(1 - (1 - self.least) * i / self.shares), size, 1)[:, :k]
            clipped = Rtn().quantize(np.clip(w, -limit, limit), form)
            away = clipped.dequantize(k) - w
            errors = [((away[:, here] @ moments.matrix[here, here]) * away[:, here]).sum(1) for here in places]
            better = np.stack(errors, 1) < best_error
            best_error = np.where(better, np.stack(errors, 1), best_error)
            best.scales[better], best.zero_points[better] = clipped.scales[better], clipped.zero_points[better]
            codes = np.repeat(better, size, 1)
            best.codes[codes] = clipped.codes[codes]
        return best


def search_scale(x: npt.NDArray[np.float32], layers: list[QuantizedWeight], scale: ChannelScale) -> npt.NDArray[np.float32]:
    """The values of a scale that make the output error of the layers that read it least, float32 [size].

    Weights are rounded by their own method, or to nearest where that needs a look at inputs as well.

    Args:
        x: inputs of the layers, float32 [tokens, K].
        layers: their weights [N, K], not scaled yet.
    """
    typical = np.maximum(scale.gather(np.abs(x).mean(0)), SMALLEST)
    tried = [typical ** np.float32(i / scale.ratios) for i in range(scale.ratios)]
    tried = [s / np.sqrt(s.max() * s.min()) for s in tried]
    losses = np.zeros(scale.ratios)
    for layer in layers:

        def loss(piece: tuple[int, npt.NDArray[Any]], layer: QuantizedWeight = layer) -> npt.NDArray[np.float64]:
            rows = piece[1].astype(np.float32)
            return np.array([_output_error(x, rows, scale.spread(s), layer) for s in tried])

        for part in in_order(loss, layer.source.chunks()):
            losses += part
    return np.asarray(tried[int(losses.argmin())], np.float32)


def _output_error(
    x: npt.NDArray[np.float32], rows: npt.NDArray[Any], s: npt.NDArray[np.float32], layer: QuantizedWeight
) -> float:
    """Sum of squares of x (W - Q(W s) / s)^T."""
    method = Rtn() if layer.method.calibrated else layer.method
    away = method.quantize(rows * s, layer.form).dequantize(rows.shape[1]) / s - rows
    return float(np.square(x @ away.T, dtype=np.float64).sum())
