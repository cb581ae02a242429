"""Scales of a layer's input channels that are folded into weights: columns times s here, what makes the channel by s there."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from passes._cores import in_order
from passes._quantized import QuantizedWeight
from passes._weights import Weight
from passes.base import PassError
from passes.methods.rtn import Rtn

SMALLEST = np.float32(1e-4)
"""A channel is taken to be at least this large on average, so that one that is always zero gets a finite scale."""


class ChannelScale:
    """One factor for each channel that a writer makes, unknown until the channels were looked at.

    Attributes:
        name: the layer that makes the channels.
        size: how many it makes.
        ratios: how many exponents are tried to find the values.
        head_dim, repeats: readers see each run of `head_dim` channels `repeats` times, as grouped queries do.
        values: float32 [size], or None.
    """

    def __init__(self, name: str, size: int, ratios: int, head_dim: int | None = None, repeats: int = 1) -> None:
        self.name, self.size, self.ratios, self.head_dim, self.repeats = name, size, ratios, head_dim or size, repeats
        self.values: np.ndarray | None = None

    def known(self) -> np.ndarray:
        """The values.

        Raises:
            PassError: nobody has searched them.
        """
        if self.values is None:
            raise PassError(f"{self.name}: its channels were not looked at; add `calibrate:` to the recipe.")
        return self.values

    def spread(self, values: np.ndarray) -> np.ndarray:
        """Values of the writer's channels [size] for the channels that readers see, [size * repeats]."""
        return np.repeat(values.reshape(-1, 1, self.head_dim), self.repeats, 1).reshape(-1)

    def gather(self, values: np.ndarray) -> np.ndarray:
        """Values of the readers' channels [size * repeats] for the writer's, [size]: the mean of those that are one."""
        return np.asarray(values.reshape(-1, self.repeats, self.head_dim).mean(1).reshape(-1))


class ScaledWeight(Weight):
    """diagonal(1 / written) W diagonal(read), float32, by rows; W [N, K], or a bias or gamma [N] that is written alone."""

    def __init__(self, source: Weight, read: ChannelScale | None = None, written: ChannelScale | None = None) -> None:
        super().__init__(source.shape, TensorProto.FLOAT)
        self.source, self.read, self.written = source, read, written

    @property
    def scales(self) -> list[np.ndarray | None]:
        """What columns are multiplied by and rows divided by."""
        read = None if self.read is None else self.read.spread(self.read.known())
        return [read, None if self.written is None else self.written.known()]

    def rows(self, start: int, stop: int) -> np.ndarray:
        read, written = self.scales
        rows = self.source.rows(start, stop).astype(np.float32)
        if read is not None:
            rows = rows * read
        if written is not None:
            rows = rows / written[start:stop].reshape(-1, *[1] * (rows.ndim - 1))
        return np.asarray(rows, np.float32)


def read_scale(weight: Weight) -> ChannelScale | None:
    """The scale of a weight's columns, if there is one."""
    while isinstance(weight, ScaledWeight):
        if weight.read is not None:
            return weight.read
        weight = weight.source
    return None


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
