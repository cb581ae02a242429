"""Codes to bytes, in the two layouts of the ONNX file. Unpacking is each packer's exact inverse.

`bits` 2, 4, 8: as MatMulNBits wants them, the least significant bits first within a row of blocks
(onnxruntime, docs/ContribOperators.md). `bits` 3: layout "nib77", true three-bit bytes that a handful of
standard byte operators turn into the nibbles of MatMulNBits(bits=4); see `pack_nib77`.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)

NIB77 = "nib77"


@numba.njit(cache=True, nogil=True)
def pack_lsb(codes, bits):  # type: ignore[no-untyped-def]
    """Codes uint8 [rows, count] -> bytes uint8 [rows, ceil(count * bits / 8)], least significant first.

    `bits` must divide 8. Two bits: byte i = c[4i] | c[4i+1] << 2 | c[4i+2] << 4 | c[4i+3] << 6.
    """
    rows, count = codes.shape
    per_byte = 8 // bits
    packed = np.zeros((rows, -(-count // per_byte)), np.uint8)
    whole = count // per_byte
    for row in range(rows):
        # one loop a width: with constant shifts each vectorizes
        if bits == 8:
            for x in range(whole):
                packed[row, x] = codes[row, x]
        elif bits == 4:
            for x in range(whole):
                packed[row, x] = codes[row, 2 * x] | codes[row, 2 * x + 1] << 4
        else:
            for x in range(whole):
                low = codes[row, 4 * x] | codes[row, 4 * x + 1] << 2
                packed[row, x] = low | codes[row, 4 * x + 2] << 4 | codes[row, 4 * x + 3] << 6
        for i in range(whole * per_byte, count):
            packed[row, whole] |= codes[row, i] << np.uint8(bits * (i % per_byte))
    return packed


@numba.njit(cache=True, nogil=True)
def unpack_lsb(packed, bits, count):  # type: ignore[no-untyped-def]
    """Bytes uint8 [rows, ceil(count * bits / 8)] -> codes uint8 [rows, count]."""
    per_byte = 8 // bits
    codes = np.empty((packed.shape[0], count), np.uint8)
    whole = count // per_byte
    for row in range(packed.shape[0]):
        # one loop a width, as in `pack_lsb`
        if bits == 8:
            for x in range(whole):
                codes[row, x] = packed[row, x]
        elif bits == 4:
            for x in range(whole):
                codes[row, 2 * x], codes[row, 2 * x + 1] = packed[row, x] & 15, packed[row, x] >> 4
        else:
            for x in range(whole):
                byte = packed[row, x]
                codes[row, 4 * x], codes[row, 4 * x + 1] = byte & 3, (byte >> 2) & 3
                codes[row, 4 * x + 2], codes[row, 4 * x + 3] = (byte >> 4) & 3, byte >> 6
        for i in range(whole * per_byte, count):
            codes[row, i] = (packed[row, i // per_byte] >> np.uint8(bits * (i % per_byte))) & ((1 << bits) - 1)
    return codes


@numba.njit(cache=True, nogil=True)
def pack_nib77(codes):  # type: ignore[no-untyped-def]
    """Three-bit codes uint8 [rows, K], K a multiple of 8 -> planes uint8 [rows, 3, K / 8].

    A nibble container would hold K / 2 bytes a row, codes 2x and 2x + 1 in bits 0-2 and 4-6 of byte x.
    Cut it in quarters of K / 8 bytes. Quarters 0, 1 and 2 are the planes; their free bits 3 and 7 hold the
    last quarter: bits (0, 4) in plane 0, (1, 5) in plane 1, (2, 6) in plane 2. So plane & 0x77 gives a
    quarter of the container directly, hence the name.
    """
    rows, k = codes.shape
    eighth = k // 8
    planes = np.empty((rows, 3, eighth), np.uint8)
    for row in range(rows):
        for t in range(eighth):
            last = codes[row, 2 * (3 * eighth + t)] | codes[row, 2 * (3 * eighth + t) + 1] << 4
            for j in range(3):
                x = j * eighth + t
                quarter = codes[row, 2 * x] | codes[row, 2 * x + 1] << 4
                planes[row, j, t] = quarter | ((last >> j) & 0x11) << 3
    return planes


@numba.njit(cache=True, nogil=True)
def unpack_nib77(planes):  # type: ignore[no-untyped-def]
    """Planes uint8 [rows, 3, K / 8] -> three-bit codes uint8 [rows, K]."""
    rows, _, eighth = planes.shape
    codes = np.empty((rows, 8 * eighth), np.uint8)
    for row in range(rows):
        for t in range(eighth):
            last = 0
            for j in range(3):
                plane = planes[row, j, t]
                x = j * eighth + t
                codes[row, 2 * x] = plane & 7
                codes[row, 2 * x + 1] = (plane >> 4) & 7
                last |= ((plane >> 3) & 0x11) << j
            x = 3 * eighth + t
            codes[row, 2 * x] = last & 7
            codes[row, 2 * x + 1] = (last >> 4) & 7
    return codes


@numba.njit(cache=True, nogil=True)
def expand_nib77(planes):  # type: ignore[no-untyped-def]
    """Planes uint8 [rows, 3, K / 8] -> the nibble container [rows, K / 2] of MatMulNBits(bits=4), see `pack_nib77`."""
    rows, _, eighth = planes.shape
    nibbles = np.empty((rows, 4 * eighth), np.uint8)
    for row in range(rows):
        first, second, third = planes[row, 0], planes[row, 1], planes[row, 2]
        for j in range(3):
            quarter, plane = nibbles[row, j * eighth : (j + 1) * eighth], planes[row, j]
            for t in range(eighth):
                quarter[t] = plane[t] & 0x77
        last = nibbles[row, 3 * eighth :]
        for t in range(eighth):
            last[t] = (first[t] >> 3) & 0x11 | (second[t] >> 2) & 0x22 | (third[t] >> 1) & 0x44
    return nibbles


def pack_codes(codes: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    """Codes uint8 [rows, K] (K padded to whole blocks) -> uint8 [rows, bytes], or [rows, 3, K / 8] at 3 bits."""
    return np.asarray(pack_nib77(codes) if bits == 3 else pack_lsb(codes, bits))


def unpack_codes(packed: npt.NDArray[np.uint8], bits: int, count: int) -> npt.NDArray[np.uint8]:
    """Bytes of the ONNX file, uint8 [rows, ...] -> codes uint8 [rows, count]."""
    rows = packed.shape[0]
    return np.asarray(unpack_nib77(packed) if bits == 3 else unpack_lsb(packed.reshape(rows, -1), bits, count))
