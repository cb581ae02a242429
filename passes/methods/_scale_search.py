"""Search of AWQ's scales: the exponent with the least output error after rounding."""

from __future__ import annotations

import numpy as np

from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.scaled_weight import ChannelScale

SMALLEST = np.float32(1e-4)
"""A channel is taken to be at least this large on average, so that one that is always zero gets a finite scale."""


def search(x: np.ndarray, layers: list[QuantizedWeight], scale: ChannelScale) -> np.ndarray:
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

        def loss(piece: tuple[int, np.ndarray], layer: QuantizedWeight = layer) -> np.ndarray:
            rows = piece[1].astype(np.float32)
            return np.array([_output_error(x, rows, scale.spread(s), layer) for s in tried])

        for part in in_order(loss, layer.source.chunks()):
            losses += part
    return np.asarray(tried[int(losses.argmin())], np.float32)


def _output_error(x: np.ndarray, rows: np.ndarray, s: np.ndarray, layer: QuantizedWeight) -> float:
    """Sum of squares of x (W - Q(W s) / s)^T."""
    method = Rtn() if layer.method.calibrated else layer.method
    away = method.quantize(rows * s, layer.form).dequantize(rows.shape[1]) / s - rows
    return float(np.square(x @ away.T, dtype=np.float64).sum())
