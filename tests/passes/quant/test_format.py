"""The grid: which scales are exact, and what the sizes are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowbit.passes.quant.format import BlockFormat, Blocks, exact_scale, rounding_table
from tests import reference

FORMATS = [BlockFormat(b, 64, False, d) for b in (2, 3, 4, 8) for d in ("fp16", "fp32")]


@pytest.mark.parametrize("form", FORMATS, ids=lambda f: f"{f.bits}-{f.scale_dtype}")
@given(scale=st.floats(2.0**-23, 100.0, width=32), data=st.data())
def test_exact_scale_is_the_nearest_that_keeps_scale_and_offset(form: BlockFormat, scale: float, data: st.DataObject) -> None:
    zero = data.draw(st.integers(0, form.max_code))
    table = rounding_table(form)
    found = float(exact_scale(np.float32(scale), table[zero, 0], table[zero, 1], form.smallest_scale))
    dtype = np.float16 if form.scale_dtype == "fp16" else np.float32
    offset = (form.middle - zero) * found
    assert float(dtype(found)) == found
    assert float(dtype(offset)) == offset
    assert found == pytest.approx(reference.exact_scale(scale, zero, form), abs=0) or _is_tie(scale, found, form, zero)


def _is_tie(scale: float, found: float, form: BlockFormat, zero: int) -> bool:
    """Half-way between two exact scales: either is nearest."""
    other = reference.exact_scale(scale, zero, form)
    return abs(found - scale) == abs(other - scale)


def test_negative_scales_round_like_positive_ones() -> None:
    form = BlockFormat(4, 64, True, "fp16")
    splitter, limit = rounding_table(form)[8]
    assert exact_scale(np.float32(-0.1), splitter, limit, form.smallest_scale) == -exact_scale(
        np.float32(0.1), splitter, limit, form.smallest_scale
    )


@pytest.mark.parametrize(
    ("form", "k", "expected"),
    [
        (BlockFormat(4, 64, True, "fp16"), 256, 4.25),
        (BlockFormat(4, 64, False, "fp16"), 256, 4.25 + 4 / 64),
        (BlockFormat(3, 64, False, "fp16"), 256, 3.25 + 4 / 64),
        (BlockFormat(2, 128, False, "fp32"), 512, 2.25 + 2 / 128),
        (BlockFormat(2, 32, True, "fp16"), 40, (64 * 2 + 32) / 40),
        (BlockFormat(3, 64, False, "fp16", "float"), 256, 3.5),
    ],
)
def test_bits_per_weight_counts_scales_and_zero_points(form: BlockFormat, k: int, expected: float) -> None:
    assert form.bits_per_weight(k) == pytest.approx(expected)


def test_dequantize_is_the_equation() -> None:
    blocks = Blocks(np.array([[0, 3, 2, 1]], np.uint8), np.array([[0.5, 2.0]], np.float32), np.array([[1, 2]], np.uint8))
    assert blocks.dequantize(3).tolist() == [[-0.5, 1.0, 0.0]]
