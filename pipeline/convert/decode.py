"""Codes, scales and offsets decoded for proofs, by code that shares nothing with the packers."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(inline="always")
def decode_row(packed, bits, codes):  # type: ignore[no-untyped-def]
    """Codes of one row of the ONNX file; three bits in layout nib77 (definition: passes/quant/pack.py, pack_nib77)."""
    if bits != 3:  # no code straddles a byte
        each = 8 // bits
        for x in range(packed.size):
            for i in range(each):
                codes[each * x + i] = (packed[x] >> np.uint8(bits * i)) & np.uint8((1 << bits) - 1)
        return
    eighth = packed.size // 3
    codes[6 * eighth :] = 0
    for plane in range(3):
        for t in range(eighth):
            byte, x = packed[plane * eighth + t], plane * eighth + t
            codes[2 * x] = byte & 7
            codes[2 * x + 1] = (byte >> 4) & 7
            codes[2 * (3 * eighth + t)] |= ((byte >> 3) & 1) << plane
            codes[2 * (3 * eighth + t) + 1] |= ((byte >> 7) & 1) << plane
