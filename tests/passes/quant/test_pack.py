"""Packing against a bit-by-bit packer that shares no code with it, and the bytes of one block."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit.passes.quant.pack import expand_nib77, pack_codes, pack_lsb, pack_nib77, unpack_codes, unpack_lsb, unpack_nib77
from tests import reference


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 7, 16, 33])
def test_lsb_equals_the_bit_by_bit_packer(bits: int, count: int) -> None:
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, count)).astype(np.uint8)
    packed = pack_lsb(codes, bits)
    np.testing.assert_array_equal(packed, reference.pack_lsb(codes, bits))
    np.testing.assert_array_equal(unpack_lsb(packed, bits, count), codes)


@pytest.mark.parametrize(("bits", "expected"), [(2, "e4e4e4e4"), (4, "1032547698badcfe"), (8, "0001020304050607")])
def test_bytes_of_one_block(bits: int, expected: str) -> None:
    codes = (np.arange(16 if bits < 8 else 8) % (1 << bits)).astype(np.uint8)[None]
    assert pack_codes(codes, bits).tobytes().hex() == expected


def test_bytes_of_one_three_bit_block() -> None:
    # codes 0..7 twice: nibbles 10 32 54 76 10 32 54 76; the last quarter 54 76 spreads into bits 3 and 7
    codes = (np.arange(16) % 8).astype(np.uint8)[None]
    assert pack_nib77(codes).tobytes().hex() == "90b254fe98ba"


@pytest.mark.parametrize("k", [8, 16, 64, 200])
def test_nib77_planes_hold_the_nibble_container(k: int) -> None:
    codes = np.random.default_rng(k).integers(0, 8, (6, k)).astype(np.uint8)
    planes = pack_nib77(codes)
    assert planes.shape == (6, 3, k // 8)
    nibbles = reference.pack_lsb(codes, 4).reshape(6, 4, k // 8)
    np.testing.assert_array_equal(planes & 0x77, nibbles[:, :3])
    last = ((planes >> np.array([[[3], [2], [1]]])) & np.array([[[0x11], [0x22], [0x44]]])).sum(1)
    np.testing.assert_array_equal(last, nibbles[:, 3])
    np.testing.assert_array_equal(unpack_nib77(planes), codes)
    np.testing.assert_array_equal(expand_nib77(planes), reference.pack_lsb(codes, 4))
    np.testing.assert_array_equal(unpack_codes(planes, 3, k), codes)
