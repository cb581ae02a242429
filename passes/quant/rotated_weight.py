"""A weight turned by a rotation, read lazily."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
from onnx import TensorProto

from lowbit.passes.quant.hadamard import Rotation
from lowbit.passes.quant.weights import Weight, rows_per_chunk


class TurnedWeight(Weight):
    """Q_out^T (W diagonal(scale)) Q_in, float32 [N, K], by rows."""

    def __init__(
        self, source: Weight, scale: Weight | None = None, turn_in: Rotation | None = None, turn_out: Rotation | None = None
    ) -> None:
        super().__init__(source.shape, TensorProto.FLOAT)
        self.source, self.scale, self.turn_in, self.turn_out = source, scale, turn_in, turn_out

    def rows(self, start: int, stop: int) -> np.ndarray:
        if self.turn_out is None:
            return self._turned(start, stop)
        size = self.turn_out.size
        first, last = start // size * size, -(-stop // size) * size
        return _LAST.of(self, first, last)[start - first : stop - first]

    def chunks(self) -> Iterator[tuple[int, np.ndarray]]:
        step = rows_per_chunk(self.nbytes // self.shape[0])
        for start in range(0, self.shape[0], step):
            yield start, self.rows(start, min(start + step, self.shape[0]))

    def _turned(self, start: int, stop: int) -> np.ndarray:
        rows = self.source.rows(start, stop).astype(np.float32)
        if self.scale is not None:
            rows = rows * self.scale.load().astype(np.float32)
        return rows if self.turn_in is None else self.turn_in.turn(rows)

    def group(self, first: int, last: int) -> np.ndarray:
        """Rows of whole groups, which turning the output mixes."""
        assert self.turn_out is not None
        return np.ascontiguousarray(self.turn_out.turn(self._turned(first, last).T).T)


class _Last:
    """The groups that were mixed last: a weight is read by rows, and each group would else be mixed anew for every few."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: tuple[TurnedWeight | None, int, int] = (None, 0, 0)
        self._rows = np.empty((0, 0), np.float32)

    def of(self, weight: TurnedWeight, first: int, last: int) -> np.ndarray:
        with self._lock:
            known, low, high = self._known
            if known is not weight or first < low or last > high:
                self._rows, self._known = weight.group(first, last), (weight, first, last)
                low = first
            return self._rows[first - low : last - low]


_LAST = _Last()
