"""Weights as lazy, read-only views: a graph carries them without holding their bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

ROW_CHUNK_BYTES = 2 << 20
"""About this much of a weight is read at once: small enough for the cache, large enough for the disk."""

Reader = Callable[[int, int], npt.NDArray[Any]]
"""What `Weight.rows` is: the first row and the one after the last -> rows [stop - start, ...]."""


class Weight(LazyValues):  # type: ignore[misc]
    """A constant of known shape and dtype whose values are read only on demand, by rows.

    Attributes:
        shape: as ONNX sees it.
        onnx_dtype: the ONNX element type, `TensorProto.BFLOAT16` and the like.
    """

    def __init__(self, shape: tuple[int, ...], onnx_dtype: int) -> None:
        self.shape = tuple(shape)
        self.onnx_dtype = onnx_dtype
        self.numpy_dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(onnx_dtype))
        # graphsurgeon knows no numpy type for bfloat16 and takes the ONNX number instead
        self.dtype = onnx_dtype if onnx_dtype == onnx.TensorProto.BFLOAT16 else self.numpy_dtype
        self.nbytes = math.prod(self.shape) * self.numpy_dtype.itemsize

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Rows `start:stop` along axis 0, shape [stop - start, ...], in the stored dtype."""
        raise TypeError(f"{type(self).__name__} cannot be read by rows")

    def reader(self) -> Reader:
        """`rows`, for one walk from the first row to the last: as long as it is held, it may keep what the next rows need."""
        return self.rows

    def load(self) -> npt.NDArray[Any]:
        """The whole weight. For small ones: everything large goes through `rows`."""
        return self.rows(0, self.shape[0]) if self.shape else self.rows(0, 1)

    def chunks(self) -> Iterator[tuple[int, npt.NDArray[Any]]]:
        """`(start, rows)` from first to last, by `ranges`."""
        read = self.reader()
        for start, stop in self.ranges():
            yield start, read(start, stop)

    def ranges(self) -> list[tuple[int, int]]:
        """The first row and the one after the last of each of `chunks`, about `ROW_CHUNK_BYTES` each."""
        count = self.shape[0] if self.shape else 1
        step = rows_per_chunk(self.nbytes // max(count, 1))
        return [(start, min(start + step, count)) for start in range(0, count, step)]

    def sample(self) -> list[tuple[int, int]]:
        """The first, the middle and the last of `ranges`: what is read again to see whether codes are those of this weight."""
        ranges = self.ranges()
        middle = len(ranges) // 2
        return sorted({*ranges[:1], *ranges[middle : middle + 1], *ranges[-1:]})

    @property
    def tensor(self) -> onnx.TensorProto:
        """The placeholder that graphsurgeon writes: dtype and shape, values elsewhere."""
        return onnx.TensorProto(data_type=self.onnx_dtype, dims=self.shape, data_location=onnx.TensorProto.EXTERNAL)


class ArrayWeight(Weight):
    """A weight that is in memory already: what the tests build, and what a plain ONNX file holds."""

    def __init__(self, array: npt.NDArray[Any]) -> None:
        super().__init__(array.shape, onnx.helper.np_dtype_to_tensor_dtype(array.dtype))
        self.array = array

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self.array[start:stop] if self.shape else self.array.reshape(1)


class DerivedWeight(Weight):
    """A weight that is computed from others; a class of it says how, by its `reader`."""

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self.reader()(start, stop)


class TransposedWeight(DerivedWeight):
    """The [N, K] view of a weight stored [K, N]."""

    def __init__(self, source: Weight) -> None:
        super().__init__(source.shape[::-1], source.onnx_dtype)
        self.source = source

    def reader(self) -> Reader:
        """Read the source once: its rows are columns here."""
        loaded = self.source.load()
        return lambda start, stop: np.ascontiguousarray(loaded[:, start:stop].T)


def rows_per_chunk(row_bytes: int) -> int:
    """How many rows of `row_bytes` bytes make one chunk; at least one."""
    return max(1, ROW_CHUNK_BYTES // max(row_bytes, 1))


def weight_of(constant: gs.Constant) -> Weight:
    """The weight behind a constant, without loading it."""
    values = constant._values
    return values if isinstance(values, Weight) else ArrayWeight(np.asarray(constant.values))


def as_bits(rows: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], int]:
    """Rows of floats as unsigned bit patterns for the kernels, which widen them to float32 by a shift.

    Returns:
        (bits, shift): float32 value = bits << shift, reinterpreted. uint16 and 16 for bfloat16 (its
        bits are float32's upper half), uint32 and 0 for all others, converted to float32 first.
    """
    if rows.dtype == ml_dtypes.bfloat16:
        return np.ascontiguousarray(rows).view(np.uint16), 16
    return np.ascontiguousarray(rows, np.float32).view(np.uint32), 0


class CastWeight(DerivedWeight):
    """A float weight rounded to another float dtype, row by row as it is read."""

    def __init__(self, source: Weight, onnx_dtype: int) -> None:
        super().__init__(source.shape, onnx_dtype)
        self.source = source

    def reader(self) -> Reader:
        read = self.source.reader()
        return lambda start, stop: read(start, stop).astype(self.numpy_dtype)


class SlicedWeight(DerivedWeight):
    """Some rows of a weight, `start:stop`."""

    def __init__(self, source: Weight, start: int, stop: int) -> None:
        super().__init__((stop - start, *source.shape[1:]), source.onnx_dtype)
        self.source, self.start = source, start

    def reader(self) -> Reader:
        read = self.source.reader()
        return lambda start, stop: read(self.start + start, self.start + stop)


class StackedWeight(DerivedWeight):
    """Weights of one dtype, the rows of the first over those of the next.

    Attributes:
        parts: their names and themselves, in order.
    """

    def __init__(self, parts: list[tuple[str, Weight]]) -> None:
        first = parts[0][1]
        super().__init__((sum(part.shape[0] for _, part in parts), *first.shape[1:]), first.onnx_dtype)
        self.parts = parts

    def reader(self) -> Reader:
        readers = [(part.shape[0], part.reader()) for _, part in self.parts]

        def rows(start: int, stop: int) -> npt.NDArray[Any]:
            pieces, begin = [], 0
            for count, read in readers:
                first, last = max(start - begin, 0), min(stop - begin, count)
                if first < last:
                    pieces.append(read(first, last))
                begin += count
            return np.concatenate(pieces)

        return rows


def widened(graph: gs.Graph, name: str, weight: Weight) -> gs.Tensor:
    """A weight as a lazy constant called `name`, behind a Cast where it is not float32."""
    constant = gs.Constant(name, weight)
    if weight.onnx_dtype == onnx.TensorProto.FLOAT:
        return constant
    wide = gs.Variable(f"{name}.fp32", np.float32, list(weight.shape))
    graph.nodes.insert(0, gs.Node("Cast", f"{name}.widen", {"to": onnx.TensorProto.FLOAT}, [constant], [wide]))
    return wide
