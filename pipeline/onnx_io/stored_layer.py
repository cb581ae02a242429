"""Where the parts of a quantized weight lie in files -> its codes, scales and zero points, by rows."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lowbit.passes.quant.format import Blocks
from lowbit.passes.quant.pack import unpack_codes, unpack_lsb
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import ROW_CHUNK_BYTES
from lowbit.pipeline.errors import PipelineError


@dataclass(frozen=True)
class Region:
    """A tensor's bytes in a file: uint8, float16 or float32, row-major, `shape[0]` rows."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, start: int, stop: int) -> npt.NDArray:
        """Rows `start:stop`, [stop - start, *shape[1:]]."""
        count = (stop - start) * math.prod(self.shape[1:])
        data = np.fromfile(self.file, self.dtype, count, offset=self.offset + start * self.row_bytes)
        if data.size != count:
            raise PipelineError(f"{self.file}: cut short; it ends inside a weight.")
        return data.reshape(stop - start, *self.shape[1:])


@dataclass(frozen=True)
class StoredLayer:
    """One quantized weight [n, k] of an ONNX file.

    Attributes:
        name: the layer, as in the checkpoint.
        codes: uint8, layout by `bits` (passes/quant/pack.py).
        scales: float16 or float32 [n, blocks].
        zero_points: packed uint8 [n, bytes], or None where every zero point is 2^(bits-1) or follows from its offset.
        offsets: float16 or float32 [n, blocks] where zero points are floats: 2^(bits-1) - offset / scale.
        is_embedding: whether a GatherBlockQuantized reads it.
    """

    name: str
    bits: int
    block_size: int
    n: int
    k: int
    codes: Region
    scales: Region
    zero_points: Region | None
    offsets: Region | None
    is_embedding: bool

    @property
    def blocks(self) -> int:
        return -(-self.k // self.block_size)

    @property
    def padded_k(self) -> int:
        return self.blocks * self.block_size

    @property
    def middle(self) -> int:
        """The zero point of a symmetric layer: 2^(bits-1)."""
        return 1 << (self.bits - 1)

    @property
    def symmetric(self) -> bool:
        return self.zero_points is None and self.offsets is None

    def scale_rows(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Scales of rows `start:stop`, float32 [stop - start, blocks]."""
        return self.scales.rows(start, stop).astype(np.float32)

    def zero_point_rows(self, start: int, stop: int) -> npt.NDArray:
        """Zero points of rows `start:stop`, uint8 or float32 [stop - start, blocks]."""
        if self.offsets is not None:
            steps = self.offsets.rows(start, stop).astype(np.float32) / self.scale_rows(start, stop)
            return np.asarray(np.float32(self.middle) - steps)
        if self.zero_points is None:
            return np.full((stop - start, self.blocks), self.middle, np.uint8)
        return np.asarray(unpack_lsb(self.zero_points.rows(start, stop), 4 if self.bits == 3 else self.bits, self.blocks))

    def block_rows(self, start: int, stop: int) -> Blocks:
        """Rows `start:stop` as they were quantized."""
        codes = unpack_codes(self.codes.rows(start, stop), self.bits, self.padded_k)
        return Blocks(codes, self.scale_rows(start, stop), self.zero_point_rows(start, stop))

    def row_ranges(self) -> Iterator[tuple[int, int]]:
        """Runs of rows, a multiple of 8 each but the last, so that packed runs end on whole bytes."""
        step = max(8, ROW_CHUNK_BYTES // self.padded_k // 8 * 8)
        for start in range(0, self.n, step):
            yield start, min(start + step, self.n)


def stored_as_entry(weight: QuantizedWeight, folder: Path) -> StoredLayer:
    """The layer as the folder of its entry in the store holds it: each part is a file."""
    regions = {name: Region(folder / name, 0, part.shape, part.numpy_dtype) for name, part in weight.parts.items()}
    n, k = weight.source.shape
    return StoredLayer(
        weight.name, weight.form.bits, weight.form.block_size, n, k,
        regions["codes"], regions["scales"], regions.get("zero_points"), regions.get("offsets"), False,
    )  # fmt: skip
