"""The codes of an ONNX file -> MNN's weight file: the same codes, scales and zero points, laid out anew.

Layout (MNN 3.6.1, IDST type 1, external): per layer, three runs of bytes without gaps:
    codes   u8 2 | out, in as u16 (u32 when either exceeds 65535) | u8 2^bits | 2^bits x i8 table | codes as one
            bit stream, most significant bit first, row-major [out][in]
    alpha   per output row and block (offset, scale), or scale alone when symmetric; fp16 or fp32
    bias    fp32 [out], may be empty
    weight = (code - 2^(bits-1)) * scale + offset
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

import numba
import numpy as np
import numpy.typing as npt

from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)
from lowbit.passes.quant.format import ScaleDtype
from lowbit.passes.quant.pack import unpack_codes
from lowbit.passes.quant.parallel import in_order
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.stored_layer import StoredLayer


@dataclass(frozen=True)
class MnnLayer:
    """Where one layer lies in MNN's weight file, and how.

    Attributes:
        layer: the codes it is made from.
        bias: [n], or None.
        offset: of its first byte in the file.
    """

    layer: StoredLayer
    bias: npt.NDArray[np.float32] | None
    scale_dtype: ScaleDtype
    offset: int

    @property
    def wide(self) -> bool:
        """Whether the shape needs 32 bits a number."""
        return max(self.layer.n, self.layer.padded_k) > 65535

    @property
    def header(self) -> bytes:
        levels = 1 << self.layer.bits
        shape = struct.pack("<II" if self.wide else "<HH", self.layer.n, self.layer.padded_k)
        return b"\x02" + shape + bytes([levels & 255]) + np.arange(-levels // 2, levels // 2, dtype=np.int8).tobytes()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of codes (header included), alpha and bias."""
        codes = -(-self.layer.n * self.layer.padded_k * self.layer.bits // 8)
        numbers = self.layer.n * self.layer.blocks * (1 if self.layer.symmetric else 2)
        alpha = numbers * (2 if self.scale_dtype == "fp16" else 4)
        return len(self.header) + codes, alpha, 0 if self.bias is None else 4 * self.layer.n

    @property
    def end(self) -> int:
        return self.offset + sum(self.sizes)

    def convolution(self) -> dict[str, Any]:
        """The `main` of MNN's Convolution in the converter's JSON form."""
        n, k = self.layer.n, self.layer.padded_k
        common = {
            "dilateX": 1, "dilateY": 1, "strideX": 1, "strideY": 1, "kernelX": 1, "kernelY": 1, "padX": 0, "padY": 0,
            "group": 1, "outputCount": n, "inputCount": k, "relu": False, "relu6": False, "padMode": "CAFFE",
            "hasOutputShape": False,
        }  # fmt: skip
        quantization = {
            "type": 1, "aMaxOrBits": self.layer.bits, "aMin": 1, "quantScale": 1.0, "scaleIn": 0.0, "scaleOut": 0.0,
            "readType": 0 if self.layer.symmetric else n * self.layer.blocks, "has_scaleInt": False,
            "useInt32": False, "weightSize": 0, "shapeInt32": self.wide,
            "scaleStorage": "FP16" if self.scale_dtype == "fp16" else "FP32",
        }  # fmt: skip
        return {"common": common, "quanParameter": quantization, "external": [self.offset, *self.sizes, 0]}

    def write(self, stream: BinaryIO) -> None:
        """Append the layer to the weight file, a few megabytes at a time.

        Raises:
            ConvertError: a scale or offset does not fit `scale_dtype` exactly.
        """
        stream.write(self.header)
        self.write_codes(stream)
        self.write_alpha(stream)
        if self.bias is not None:
            stream.write(np.ascontiguousarray(self.bias, np.float32).data)

    def write_codes(self, stream: BinaryIO) -> None:
        """Append the codes as one stream of bits."""

        def repacked(rows: tuple[int, int]) -> memoryview:
            codes = unpack_codes(self.layer.codes.rows(*rows), self.layer.bits, self.layer.padded_k)
            return pack_msb(codes.reshape(-1), self.layer.bits).data

        for piece in in_order(repacked, self.layer.row_ranges()):
            stream.write(piece)

    def write_alpha(self, stream: BinaryIO) -> None:
        """Append the offsets and scales."""
        for start, stop in self.layer.row_ranges():
            stream.write(self._alpha(start, stop).data)

    def _alpha(self, start: int, stop: int) -> npt.NDArray[Any]:
        dtype = np.float16 if self.scale_dtype == "fp16" else np.float32
        layer = self.layer
        scales = layer.scales.rows(start, stop).astype(np.float64)
        exact = scales
        if layer.offsets is not None:
            exact = np.stack([layer.offsets.rows(start, stop).astype(np.float64), scales], -1)
        elif layer.zero_points is not None:
            exact = np.stack([(layer.middle - layer.zero_point_rows(start, stop).astype(np.float64)) * scales, scales], -1)
        with np.errstate(over="ignore"):
            alpha = exact.astype(dtype)
        if not np.array_equal(alpha.astype(np.float64), exact):
            raise ConvertError(
                f"{layer.name}: scales in rows {start} to {stop} are not exact in {self.scale_dtype}. "
                f"Quantize with scale_dtype: {self.scale_dtype}, or set convert: {{scale_dtype: fp32}}."
            )
        return np.ascontiguousarray(alpha)


@numba.njit(cache=True, nogil=True)
def pack_msb(codes, bits):  # type: ignore[no-untyped-def]
    """Codes uint8 [count] -> bytes uint8 [ceil(count * bits / 8)], one stream, most significant bit first.

    Eight codes fill exactly `bits` bytes, so groups of eight are packed independently.
    """
    count = codes.size
    packed = np.zeros(-(-count * bits // 8), np.uint8)
    for group in range(-(-count // 8)):
        word = np.uint64(0)
        for i in range(8):
            at = group * 8 + i
            word = (word << np.uint64(bits)) | np.uint64(codes[at] if at < count else 0)
        for i in range(bits):
            if group * bits + i < packed.size:
                packed[group * bits + i] = np.uint8((word >> np.uint64(8 * (bits - 1 - i))) & np.uint64(255))
    return packed


def lay_out(
    layers: list[tuple[StoredLayer, npt.NDArray[np.float32] | None]], scale_dtype: ScaleDtype, start: int = 0
) -> list[MnnLayer]:
    """The places of layers (with their biases) in one weight file, in the order given, from byte `start` on."""
    placed: list[MnnLayer] = []
    for layer, bias in layers:
        offset = placed[-1].end if placed else start
        placed.append(MnnLayer(layer, bias, scale_dtype, offset))
    return placed
