"""Every method against its slow reference, and the relations that must hold between them."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from lowbit.passes import methods
from lowbit.passes.base import PassError
from lowbit.passes.methods.awq import Awq
from lowbit.passes.methods.gptq import Gptq
from lowbit.passes.methods.hqq import Hqq
from lowbit.passes.methods.mse import Mse
from lowbit.passes.methods.refine import Refine
from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.methods.signround import Signround
from lowbit.passes.methods.weighted_mse import WeightedMse
from lowbit.passes.quant.format import BlockFormat, Blocks, ScaleDtype, exact_grid
from lowbit.passes.quant.hessian import Hessian, Moments
from lowbit.passes.quant.method import Method
from lowbit.passes.registry import find_method, names_in
from tests import reference, reference_calibrated

REFERENCES = {"rtn": (Rtn(), reference.rtn), "mse": (Mse(), reference.mse), "hqq": (Hqq(), reference.hqq)}
CALIBRATED = {
    "weighted_mse": (WeightedMse(), reference.weighted_mse),
    "gptq": (Gptq(), reference_calibrated.gptq),
    "refine": (Refine(), reference_calibrated.refine),
    "signround": (Signround(), reference_calibrated.signround),
    "awq": (Awq(), reference_calibrated.awq),
}
DTYPES = {"fp32": np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def weights(rows: int, k: int, dtype: str = "fp32", seed: int = 0) -> np.ndarray:
    """Heavy-tailed weights with an all-zero block and rows of one sign."""
    w = np.random.default_rng(seed).standard_t(4, (rows, k)).astype(np.float32) * 0.02
    w[0, :32] = 0
    w[1] = np.abs(w[1])
    w[2] = -np.abs(w[2])
    return w.astype(DTYPES[dtype])


def test_every_method_has_a_reference() -> None:
    assert names_in(methods) == sorted([*REFERENCES, *CALIBRATED])
    assert [name for name in names_in(methods) if find_method(name).calibrated] == sorted(CALIBRATED)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("k", [128, 172, 40])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_kernel_equals_reference(name: str, bits: int, block_size: int, symmetric: bool, k: int) -> None:
    method, slow = REFERENCES[name]
    form = BlockFormat(bits, block_size, symmetric, "fp16" if bits != 3 else "fp32")
    rows = weights(19, k)
    found, expected = method.quantize(rows, form), slow(rows, form)
    np.testing.assert_array_equal(found.scales, expected.scales)
    np.testing.assert_array_equal(found.zero_points, expected.zero_points)
    np.testing.assert_array_equal(found.codes, expected.codes)


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("k", [128, 172, 40])
@pytest.mark.parametrize("scale_dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_free_zero_points_equal_reference(name: str, bits: int, scale_dtype: ScaleDtype, k: int) -> None:
    """Sums in another order: a block may stop a round earlier, hence nearly all."""
    method, slow = REFERENCES[name]
    form, rows = BlockFormat(bits, 32, False, scale_dtype, "float"), weights(19, k)
    found, expected = method.quantize(rows, form), slow(rows, form)
    assert (found.codes == expected.codes).mean() > 0.99
    assert np.isclose(found.scales, expected.scales, rtol=1e-6, atol=0).mean() > 0.97
    assert np.isclose(found.zero_points, expected.zero_points, rtol=1e-4, atol=1e-4).mean() > 0.97
    np.testing.assert_array_equal(
        *(exact_grid(found.scales, zeros, form)[0] for zeros in (found.zero_points, 0 * found.scales))
    )
    integer = method.quantize(rows, replace(form, zero_point="integer"))
    on_weights = [((blocks.dequantize(k) - rows) ** 2).mean() for blocks in (found, integer)]
    assert on_weights[0] < (1.4 if name == "rtn" else 0.99) * on_weights[1]


def test_blocks_of_one_value_are_their_offset() -> None:
    rows = np.array([[0.25] * 16 + [-3.0] * 16 + [0.0] * 16], np.float32)
    for method in (Rtn(), Mse()):
        found = method.quantize(rows, BlockFormat(2, 16, False, "fp16", "float"))
        np.testing.assert_allclose(found.dequantize(48), rows, rtol=2**-11, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REFERENCES)
def test_half_precision_input_is_widened_exactly(name: str, dtype: str) -> None:
    method, _ = REFERENCES[name]
    rows = weights(20, 96, dtype)
    form = BlockFormat(4, 32, False, "fp16")
    found, expected = method.quantize(rows, form), method.quantize(rows.astype(np.float32), form)
    np.testing.assert_array_equal(found.codes, expected.codes)
    np.testing.assert_array_equal(found.scales, expected.scales)


@pytest.mark.parametrize("name", [*REFERENCES, *CALIBRATED])
def test_rows_do_not_depend_on_their_neighbours(name: str) -> None:
    method, _ = (REFERENCES | CALIBRATED)[name]
    rows, form, inputs = weights(40, 128), BlockFormat(3, 64, False, "fp16"), hessian(128)
    whole, part = method.quantize(rows, form, inputs), method.quantize(rows[7:30], form, inputs)
    np.testing.assert_array_equal(whole.codes[7:30], part.codes)
    np.testing.assert_array_equal(whole.scales[7:30], part.scales)


def hessian(k: int, seed: int = 1) -> Hessian:
    """Second moments of inputs that are correlated and of very different sizes, one of them always zero."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((4 * k, k)) @ (np.eye(k) + 0.5 * rng.standard_normal((k, k)) / np.sqrt(k))
    x *= np.exp(0.7 * rng.standard_normal(k))
    x[:, k // 3] = 0
    moments = Moments(k)
    for part in np.array_split(x.astype(np.float32), 3):
        moments.add(part)
    return moments.hessian()


def output_error(rows: np.ndarray, blocks: Blocks, inputs: Hessian) -> float:
    """tr(E H E^T), damped as the methods damp it."""
    e = rows.astype(np.float64) - blocks.dequantize(rows.shape[1])
    h = inputs.matrix + 0.01 * inputs.diagonal.mean() * np.eye(len(inputs.matrix))
    return float(((e @ h) * e).sum())


@pytest.mark.parametrize("name", CALIBRATED)
@pytest.mark.parametrize("k", [64, 44])
@pytest.mark.parametrize("kind", ["asym", "sym", "free"])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_calibrated_kernel_equals_reference(name: str, bits: int, block_size: int, kind: str, k: int) -> None:
    """Float32 against float64: a tie may fall to the other side and take the rest of its row along, hence nearly all rows."""
    method, slow = CALIBRATED[name]
    form = BlockFormat(bits, block_size, kind == "sym", "fp16", "float" if kind == "free" else "integer")
    rows, inputs = weights(12, k), hessian(k)
    found, expected = method.quantize(rows, form, inputs), slow(rows, form, inputs)
    same = (found.codes == expected.codes).all(1) & (found.scales == expected.scales).all(1)
    assert same.sum() >= 10
    assert output_error(rows, found, inputs) == pytest.approx(output_error(rows, expected, inputs), rel=0.02)
    padding = np.rint(found.zero_points[:, -1:]).clip(0, form.max_code)
    np.testing.assert_array_equal(found.codes[:, k:], np.repeat(padding, found.codes.shape[1] - k, 1))
    if form.free and name != "signround":  # which descends from the whole range, to wherever the signs lead
        integer = method.quantize(rows, replace(form, zero_point="integer"), inputs)
        assert output_error(rows, found, inputs) < output_error(rows, integer, inputs)


def test_activation_order_equals_reference() -> None:
    form, rows, inputs = BlockFormat(3, 16, False, "fp16"), weights(12, 64), hessian(64)
    found = Gptq(order="activation").quantize(rows, form, inputs)
    expected = reference_calibrated.gptq(rows, form, inputs, ordered=True)
    np.testing.assert_array_equal(found.scales, expected.scales)
    assert (found.codes == expected.codes).all(1).sum() >= 10


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_relations_between_calibrated_methods(bits: int, symmetric: bool) -> None:
    form, rows, inputs = BlockFormat(bits, 32, symmetric, "fp16"), weights(64, 256), hessian(256)
    names = ("rtn", "mse", "awq", "weighted_mse", "gptq", "refine", "signround")
    by_name = {name: find_method(name)().quantize(rows, form, inputs) for name in names}
    outputs = {name: output_error(rows, blocks, inputs) for name, blocks in by_name.items()}
    on_weights = {name: ((blocks.dequantize(256) - rows) ** 2).mean() for name, blocks in by_name.items()}
    importance = {n: ((b.dequantize(256) - rows) ** 2 * inputs.diagonal).mean() for n, b in by_name.items()}
    assert outputs["refine"] < 0.95 * outputs["gptq"] < 0.8 * outputs["mse"]
    assert outputs["gptq"] < outputs["awq"] < outputs["rtn"]
    assert outputs["signround"] < 0.9 * outputs["mse"]
    assert on_weights["mse"] < on_weights["gptq"], "what GPTQ wins on outputs it pays for on weights"
    assert importance["weighted_mse"] < importance["mse"]
    again = Refine(after=Mse(), sweeps=1).quantize(rows, form, inputs)
    assert output_error(rows, again, inputs) < outputs["mse"]
    for blocks in by_name.values():
        assert blocks.codes.max() <= form.max_code
        for scale, zero in zip(blocks.scales.ravel()[:200], blocks.zero_points.ravel()[:200], strict=True):
            assert scale == reference.exact_scale(float(scale), int(zero), form)


def test_calibrated_methods_want_inputs() -> None:
    with pytest.raises(PassError, match="got no inputs of the layer to look at; add `calibrate:`"):
        Gptq().quantize(weights(4, 32), BlockFormat(4, 32, False, "fp16"))


def error(method: Method, rows: np.ndarray, form: BlockFormat) -> float:
    return float(((method.quantize(rows, form).dequantize(rows.shape[1]) - rows) ** 2).mean())


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rtn_is_within_half_a_step_and_mse_is_never_worse(bits: int, symmetric: bool) -> None:
    rows, form = weights(64, 512), BlockFormat(bits, 64, symmetric, "fp16")
    plain = Rtn().quantize(rows, form)
    step = np.repeat(np.abs(plain.scales), 64, axis=1)
    inside = (plain.codes > 0) & (plain.codes < form.max_code)
    miss = np.abs(plain.dequantize(512) - rows)
    assert (miss[inside] <= 0.5001 * step[inside]).all()
    assert error(Mse(), rows, form) < error(Rtn(), rows, form)
    assert error(Hqq(), rows, form) < 1.02 * error(Rtn(), rows, form)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_mse_is_near_an_exhaustive_grid(bits: int) -> None:
    rows, form = weights(48, 128), BlockFormat(bits, 64, False, "fp32")
    w, _ = reference.blocks_of(rows, form)
    low, high = np.minimum(w.min(-1), 0), np.maximum(w.max(-1), 0)
    best = np.full(low.shape, np.inf)
    for f in np.linspace(0.35, 1, 27):
        for g in np.linspace(0.35, 1, 27):
            scale = np.maximum((high * g - low * f) / form.max_code, 1e-9)
            zero = np.clip(np.rint(-low * f / scale), 0, form.max_code)
            codes = np.clip(np.rint(w / scale[..., None]) + zero[..., None], 0, form.max_code)
            best = np.minimum(best, (((codes - zero[..., None]) * scale[..., None] - w) ** 2).mean(-1))
    assert error(Mse(), rows, form) < 1.01 * best.mean()


def test_symmetric_reaches_the_largest_weight_exactly() -> None:
    rows = np.array([[-1.0, 0.25, 0.5, 0.75] * 4, [1.0, -0.25, -0.5, -0.75] * 4], np.float32)
    found = Rtn().quantize(rows, BlockFormat(3, 16, True, "fp32"))
    assert found.scales.ravel().tolist() == [0.25, -0.25]
    np.testing.assert_array_equal(found.dequantize(16), rows)


def test_unknown_method_names_the_nearest() -> None:
    with pytest.raises(KeyError, match="there is no method 'mes'. Did you mean 'mse'?"):
        find_method("mes")
