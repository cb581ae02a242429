"""A weight that is to be quantized: its error, its parts, its refusals."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit.passes.base import Options, Pass
from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.quantized_weight import QuantizedWeight, all_finite, squared_error
from lowbit.passes.quant.weights import ArrayWeight, CastWeight, TransposedWeight, Weight, as_bits


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_squared_error_bytes_of_one_weight(bits: int) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
    form = BlockFormat(bits, 16, False, "fp32")
    blocks = Rtn().quantize(rows, form)
    wide, shift = as_bits(rows)
    found, square = squared_error(wide, np.uint32(shift), blocks.codes, blocks.scales, blocks.zero_points)
    w = (blocks.codes.reshape(5, 3, 16).astype(float) - blocks.zero_points[..., None]) * blocks.scales[..., None].astype(float)
    assert found == pytest.approx(((w.reshape(5, -1)[:, :40] - rows) ** 2).sum(), rel=1e-5)
    assert square == pytest.approx((rows.astype(float) ** 2).sum(), rel=1e-9)
    assert all_finite(wide, np.uint32(shift))
    rows[3, 7] = -np.inf
    assert not all_finite(as_bits(rows)[0], np.uint32(0))


def test_parts_have_the_shapes_they_announce() -> None:
    for bits in (2, 3, 4, 8):
        for kind in ("zero_points", "symmetric", "offsets"):
            form = BlockFormat(bits, 16, kind == "symmetric", "fp16", "float" if kind == "offsets" else "integer")
            weight = QuantizedWeight("a", ArrayWeight(np.ones((6, 40), np.float32)), form, Rtn())
            assert list(weight.parts)[2:] == ([] if kind == "symmetric" else [kind])
            for part in weight.parts.values():
                values = part.load()
                assert (values.shape, values.nbytes) == (part.shape, part.nbytes)
                np.testing.assert_array_equal(part.rows(1, 3), values[1:3])


def test_views_of_weights() -> None:
    w = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(TransposedWeight(ArrayWeight(w)).rows(1, 3), w.T[1:3])
    assert CastWeight(ArrayWeight(w), 10).load().dtype == np.float16
    np.testing.assert_array_equal(ArrayWeight(np.float32(3)).load(), [3])
    assert ArrayWeight(w).tensor.data_location == 1


def test_the_bases_do_nothing_by_themselves() -> None:
    with pytest.raises(TypeError, match="Weight cannot be read"):
        Weight((2, 2), 1).load()
    with pytest.raises(TypeError, match="Pass does not say"):
        Pass().apply(None)
    with pytest.raises(TypeError, match="Method does not say"):
        Method().quantize(np.ones((1, 1)), BlockFormat(4, 16, False, "fp16"))
    with pytest.raises(ValueError, match="frozen"):
        Options().anything = 1  # type: ignore[attr-defined]
