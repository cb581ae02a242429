"""A finished model.onnx -> its quantized weights, read back from the file itself."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

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


def read_layers(model_file: Path) -> dict[str, StoredLayer]:
    """Every quantized weight of a model file, by layer name; no weight is read."""
    model = onnx.load(str(model_file), load_external_data=False)
    tensors = {t.name: t for t in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    layers = {}
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "MatMul3Bits", "GatherBlockQuantized"):
            continue
        attrs = {a.name: a.i for a in node.attribute}
        embedding = node.op_type == "GatherBlockQuantized"
        codes = region(model_file, tensors[node.input[0 if embedding else 1]])
        scales = _widened(node.input[2], makers)
        zeros = tensors.get(node.input[3]) if len(node.input) > 3 else None
        bits = attrs["bits"]
        offsets = _offsets_behind(node.input[3], scales, bits, makers, tensors) if len(node.input) > 3 else None
        n, k = (codes.shape[0], codes.shape[1] * 8 // bits) if embedding else (attrs["N"], attrs["K"])
        layers[node.name] = StoredLayer(
            node.name, bits, attrs["block_size"], n, k, codes, region(model_file, tensors[scales]),
            None if zeros is None else region(model_file, zeros),
            None if offsets is None else region(model_file, tensors[offsets]), embedding,
        )  # fmt: skip
    return layers


def _widened(name: str, makers: dict[str, onnx.NodeProto]) -> str:
    """The tensor behind a Cast, or itself."""
    maker = makers.get(name)
    return maker.input[0] if maker is not None and maker.op_type == "Cast" else name


def _offsets_behind(
    zeros: str, scales: str, bits: int, makers: dict[str, onnx.NodeProto], tensors: dict[str, TensorProto]
) -> str | None:
    """The offsets of zero points that are computed as 2^(bits-1) - offsets / scales; None if they are not computed so."""
    difference = makers.get(zeros)
    if difference is None or difference.op_type != "Sub":
        return None
    middle, ratio = tensors.get(difference.input[0]), makers.get(difference.input[1])
    if middle is None or ratio is None or ratio.op_type != "Div" or _widened(ratio.input[1], makers) != scales:
        return None
    codes = {bits, 3} if bits == 4 else {bits}  # nibbles may hold three-bit codes
    same = onnx.numpy_helper.to_array(middle).tolist() in {1 << (width - 1) for width in codes}
    return _widened(ratio.input[0], makers) if same else None


def stored_as_entry(weight: QuantizedWeight, folder: Path) -> StoredLayer:
    """The layer as the folder of its entry in the store holds it: each part is a file."""
    regions = {name: Region(folder / name, 0, part.shape, part.numpy_dtype) for name, part in weight.parts.items()}
    n, k = weight.source.shape
    return StoredLayer(
        weight.name, weight.form.bits, weight.form.block_size, n, k,
        regions["codes"], regions["scales"], regions.get("zero_points"), regions.get("offsets"), False,
    )  # fmt: skip


def region(model_file: Path, tensor: TensorProto) -> Region:
    """Where the external data of a tensor lies: always a file beside the model."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    name = place.get("location", "")
    if not name or Path(name).name != name:
        raise PipelineError(f"{model_file}: '{tensor.name}' lies at '{name}', not in a file beside the model.")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return Region(model_file.parent / name, int(place.get("offset", 0)), tuple(tensor.dims), dtype)
