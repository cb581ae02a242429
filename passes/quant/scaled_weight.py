"""Scales of a layer's input channels that are folded into weights: columns times s here, what makes the channel by s there."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from lowbit.passes.base import PassError
from lowbit.passes.quant.weights import DerivedWeight, Reader, Weight


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
        self.values: npt.NDArray[np.float32] | None = None

    def known(self) -> npt.NDArray[np.float32]:
        """The values.

        Raises:
            PassError: nobody has searched them.
        """
        if self.values is None:
            raise PassError(f"{self.name}: its channels were not looked at; add `calibrate:` to the recipe.")
        return self.values

    def spread(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Values of the writer's channels [size] for the channels that readers see, [size * repeats]."""
        return np.repeat(values.reshape(-1, 1, self.head_dim), self.repeats, 1).reshape(-1)

    def gather(self, values: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Values of the readers' channels [size * repeats] for the writer's, [size]: the mean of those that are one."""
        return np.asarray(values.reshape(-1, self.repeats, self.head_dim).mean(1).reshape(-1))


class ScaledWeight(DerivedWeight):
    """diagonal(1 / written) W diagonal(read), float32, by rows; W [N, K], or a bias or gamma [N] that is written alone."""

    def __init__(self, source: Weight, read: ChannelScale | None = None, written: ChannelScale | None = None) -> None:
        super().__init__(source.shape, TensorProto.FLOAT)
        self.source, self.read, self.written = source, read, written

    @property
    def scales(self) -> list[npt.NDArray[np.float32] | None]:
        """What columns are multiplied by and rows divided by."""
        read = None if self.read is None else self.read.spread(self.read.known())
        return [read, None if self.written is None else self.written.known()]

    def reader(self) -> Reader:
        (columns, divisors), read = self.scales, self.source.reader()

        def rows(start: int, stop: int) -> npt.NDArray[np.float32]:
            scaled = read(start, stop).astype(np.float32)
            if columns is not None:
                scaled = scaled * columns
            if divisors is not None:
                scaled = scaled / divisors[start:stop].reshape(-1, *[1] * (scaled.ndim - 1))
            return np.asarray(scaled, np.float32)

        return rows


def read_scale(weight: Weight) -> ChannelScale | None:
    """The scale of a weight's columns, if there is one."""
    while isinstance(weight, ScaledWeight):
        if weight.read is not None:
            return weight.read
        weight = weight.source
    return None
