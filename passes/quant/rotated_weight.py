"""A weight turned by a rotation, read lazily."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from lowbit.passes.quant.hadamard import Rotation
from lowbit.passes.quant.weights import DerivedWeight, Reader, Weight


class TurnedWeight(DerivedWeight):
    """Q_out^T (W diagonal(scale)) Q_in, float32 [N, K], by rows."""

    def __init__(
        self, source: Weight, scale: Weight | None = None, turn_in: Rotation | None = None, turn_out: Rotation | None = None
    ) -> None:
        super().__init__(source.shape, TensorProto.FLOAT)
        self.source, self.scale, self.turn_in, self.turn_out = source, scale, turn_in, turn_out

    def reader(self) -> Reader:
        read = self.source.reader()
        scale = None if self.scale is None else self.scale.load().astype(np.float32)

        def rows(start: int, stop: int) -> npt.NDArray[np.float32]:
            scaled = read(start, stop).astype(np.float32)
            if scale is not None:
                scaled = scaled * scale
            return scaled if self.turn_in is None else self.turn_in.turn(scaled)

        return rows if self.turn_out is None else _mixed(rows, self.turn_out)


def _mixed(read: Reader, rotation: Rotation) -> Reader:
    """Turn the other side, which mixes whole groups of rows: those mixed last are kept for the rows that come next."""
    first = 0
    mixed: npt.NDArray[np.float32] = np.empty((0, 0), np.float32)

    def rows(start: int, stop: int) -> npt.NDArray[Any]:
        nonlocal first, mixed
        low, high = start // rotation.size * rotation.size, -(-stop // rotation.size) * rotation.size
        if low < first or high > first + len(mixed):
            first, mixed = low, np.ascontiguousarray(rotation.turn(read(low, high).T).T)
        return mixed[start - first : stop - first]

    return rows
