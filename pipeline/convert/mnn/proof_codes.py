"""Codes, scales and zero points of one layer: those of the ONNX file against those at a place in an MNN file."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np

from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)
from lowbit.passes.quant.parallel import in_order
from lowbit.pipeline.convert.decode import decode_row
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.stored_layer import Region, StoredLayer


def prove_codes(layer: StoredLayer, file: Path, first: int) -> None:
    """Compare the layer's codes with the bit stream that begins at byte `first` of `file`.

    Raises:
        ConvertError: one differs; names the first.
    """
    bits, k = layer.bits, layer.padded_k

    def compare(rows: tuple[int, int]) -> int:
        start, stop = rows
        stream = np.fromfile(file, np.uint8, -(-(stop - start) * k * bits // 8), offset=first + start * k * bits // 8)
        wrong = int(compare_codes(layer.codes.rows(start, stop).reshape(stop - start, -1), stream, bits, k))
        return wrong if wrong < 0 else start * k + wrong

    for wrong in in_order(compare, layer.row_ranges()):
        if wrong >= 0:
            raise ConvertError(
                f"{layer.name}: the code of weight [{wrong // k}, {wrong % k}] differs between "
                f"{layer.codes.file.name} and {file.name}."
            )


def prove_alpha(layer: StoredLayer, alpha: Region, symmetric: bool) -> None:
    """Compare the layer's scales and zero points with MNN's (offset, scale), or scale alone.

    Raises:
        ConvertError: one differs; names the first.
    """
    if symmetric != layer.symmetric:
        raise ConvertError(f"{layer.name}: one file has zero points, the other has none.")

    def compare(rows: tuple[int, int]) -> None:
        start, stop = rows
        found = alpha.rows(start, stop).astype(np.float64)
        scales = layer.scales.rows(start, stop).astype(np.float64)
        middle = 1 << (layer.bits - 1)
        zeros = np.full(scales.shape, float(middle))
        if layer.zero_points is not None:
            packed = layer.zero_points.rows(start, stop)
            width = 8 * layer.zero_points.shape[1] // layer.blocks if layer.bits == 8 else (2 if layer.bits == 2 else 4)
            stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : layer.blocks * width]
            zeros = (stream.reshape(stop - start, layer.blocks, width) << np.arange(width)).sum(-1).astype(np.float64)
        offsets = (middle - zeros) * scales if layer.offsets is None else layer.offsets.rows(start, stop).astype(np.float64)
        pairs = [(found, scales)] if symmetric else [(found[..., 1], scales), (found[..., 0], offsets)]
        for what, (theirs, ours) in zip(("scale", "offset"), pairs, strict=False):
            if not np.array_equal(theirs, ours):
                row, block = np.argwhere(theirs != ours)[0]
                raise ConvertError(
                    f"{layer.name}: the {what} of row {start + row}, block {block} is {theirs[row, block]!r} in "
                    f"{alpha.file.name}, {ours[row, block]!r} in {layer.scales.file.name}."
                )

    for _ in in_order(compare, layer.row_ranges()):
        pass


@numba.njit(cache=True, nogil=True, error_model="numpy")
def compare_codes(packed, stream, bits, k):  # type: ignore[no-untyped-def]
    """Index in row-major order of the first code that differs, or -1.

    Args:
        packed: uint8 [rows, bytes], rows of the ONNX file.
        stream: uint8, the same rows in MNN's stream, most significant bit first: eight codes are `bits` bytes.
        k: codes in a row, a multiple of 8.
    """
    codes = np.empty(k, np.uint8)
    mask = np.uint64((1 << bits) - 1)
    for row in range(packed.shape[0]):
        decode_row(packed[row], bits, codes)
        for group in range(k // 8):
            start = (row * (k // 8) + group) * bits
            word = np.uint64(0)
            for byte in stream[start : start + bits]:
                word = word << np.uint64(8) | np.uint64(byte)
            eight = codes[8 * group : 8 * group + 8]
            for i in range(8):
                if np.uint64(eight[i]) != (word >> np.uint64(bits * (7 - i))) & mask:
                    return row * k + 8 * group + i
    return -1
