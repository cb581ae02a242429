"""quantize_matmul: it fires, it refuses, it keeps the numbers of its codes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from lowbit.passes.base import PassError
from lowbit.passes.quantize_matmul import QuantizeMatmul
from tests.graphs import dequantized, graph, ops, random, run, weights_of

# as PyTorch exports: [N, K] behind a Transpose
TRANSPOSED = "g (float[m, {k}] x) => (float[m, {n}] y) {{ t = Transpose <perm = [1, 0]> (a__proj__weight) y = MatMul (x, t) }}"
# as other exporters write it: [K, N]
DIRECT = "g (float[m, {k}] x) => (float[m, {n}] y) {{ y = MatMul (x, a__proj__weight) }}"
TWO = """g (float[m, 64] x) => (float[m, 64] y) {
    t1 = Transpose <perm = [1, 0]> (m__up__weight)
    h = MatMul (x, t1)
    t2 = Transpose <perm = [1, 0]> (m__down__weight)
    y = MatMul (h, t2)
}"""


def two() -> gs.Graph:
    return graph(TWO, m__up__weight=random(96, 64), m__down__weight=random(64, 96))


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("k", [128, 200, 40])
@pytest.mark.parametrize("kind", [{}, {"symmetric": True}, {"zero_point": "float"}], ids=["asym", "sym", "free"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_onnxruntime_computes_what_the_codes_say(bits: int, kind: dict[str, Any], k: int, accuracy_level: int) -> None:
    if bits == 8 and "zero_point" in kind:
        return
    g = graph(TRANSPOSED.format(k=k, n=48), a__proj__weight=random(48, k))
    options = QuantizeMatmul(bits=bits, block_size=32, accuracy_level=accuracy_level, **kind)
    assert options.apply(g).rewritten == ("a.proj",)
    assert "MatMul" not in ops(g)
    assert "Transpose" not in ops(g)
    x = random(5, k, seed=1)
    expected = x @ dequantized(weights_of(g)["a.proj"]).T
    error = np.linalg.norm(run(g, x=x)[0] - expected) / np.linalg.norm(expected)
    assert error < (1e-6 if accuracy_level == 0 else 2e-2)


@pytest.mark.parametrize("scale_dtype", ["fp16", "fp32"])
def test_a_weight_stored_k_by_n_is_the_same_weight(scale_dtype: str) -> None:
    w = random(48, 64)
    options = QuantizeMatmul(bits=4, block_size=32, scale_dtype=scale_dtype, accuracy_level=0)
    one = graph(TRANSPOSED.format(k=64, n=48), a__proj__weight=w)
    other = graph(DIRECT.format(k=64, n=48), a__proj__weight=np.ascontiguousarray(w.T))
    options.apply(one)
    options.apply(other)
    x = random(3, 64, seed=1)
    np.testing.assert_array_equal(run(one, x=x)[0], run(other, x=x)[0])


def test_include_and_exclude_say_why_a_layer_is_left_alone() -> None:
    g = two()
    assert QuantizeMatmul(bits=4, block_size=32, include=("m.*",), exclude=("*.down",)).apply(g).skipped == {
        "m.down": "excluded by '*.down'"
    }
    assert QuantizeMatmul(bits=2, block_size=16, include=("*.down",)).apply(g).skipped == {}
    found = weights_of(g)
    assert {name: (w.form.bits, w.form.block_size) for name, w in found.items()} == {"m.up": (4, 32), "m.down": (2, 16)}


def test_a_pattern_that_matches_nothing_names_the_closest_layers() -> None:
    with pytest.raises(PassError, match=r"include: '\*.dwn' matches no weight. The closest real names: 'm.down'"):
        QuantizeMatmul(bits=4, include=("*.dwn",)).apply(two())
    with pytest.raises(PassError, match=r"exclude: 'lm_head' matches no weight"):
        QuantizeMatmul(bits=4, exclude=("lm_head",)).apply(two())


def test_a_later_entry_takes_what_an_earlier_one_left() -> None:
    g = two()
    QuantizeMatmul(bits=2, block_size=32, include=("*.down",)).apply(g)
    rest = QuantizeMatmul(bits=4, block_size=32, exclude=("*.down",)).apply(g)  # the pattern is real, though taken
    assert rest.rewritten == ("m.up",)
    with pytest.raises(PassError, match=r"nothing to quantize: earlier passes took m.down, m.up"):
        QuantizeMatmul(bits=4).apply(g)


def test_a_graph_without_constant_weights_is_refused() -> None:
    g = graph("g (float[2, 4] x, float[4, 3] w) => (float[2, 3] y) { y = MatMul (x, w) }")
    with pytest.raises(PassError, match=r"no MatMul has a constant 2-D weight"):
        QuantizeMatmul(bits=4).apply(g)


def test_a_weight_used_twice_is_refused() -> None:
    g = graph(
        "g (float[2, 32] x) => (float[2, 32] z) { y = MatMul (x, a__weight) z = MatMul (y, a__weight) }",
        a__weight=random(32, 32),
    )
    with pytest.raises(PassError, match="read the weight 'a'"):
        QuantizeMatmul(bits=4, block_size=32).apply(g)


def test_tied_weights_are_said() -> None:
    g = graph(
        """g (int64[m] ids) => (float[m, 40] y) {
            h = Gather (embed__weight, ids)
            t = Transpose <perm = [1, 0]> (embed__weight)
            [lm] y = MatMul (h, t)
        }""",
        embed__weight=random(40, 32),
    )
    next(node for node in g.nodes if node.op == "MatMul").name = "/lm_head/MatMul"
    outcome = QuantizeMatmul(bits=4, block_size=32).apply(g)
    assert outcome.rewritten == ("lm_head",)
    assert outcome.notes[0].startswith("lm_head shares 'embed.weight' with the embedding (tied)")
    assert "Gather" in ops(g)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    w = random(20, 32)
    w[13, 5] = value
    g = graph(DIRECT.format(k=20, n=32), a__proj__weight=w)
    QuantizeMatmul(bits=4, block_size=32).apply(g)
    with pytest.raises(PassError, match=r"a.proj: weight \[5, 13\] is (nan|inf)"):
        weights_of(g)["a.proj"].parts["codes"].load()


def test_weights_too_large_for_half_precision_scales_are_refused() -> None:
    g = graph(DIRECT.format(k=32, n=8), a__proj__weight=random(32, 8) * 1e6)
    QuantizeMatmul(bits=4, block_size=32).apply(g)
    with pytest.raises(PassError, match="set scale_dtype: fp32"):
        weights_of(g)["a.proj"].parts["codes"].load()


def test_offsets_too_large_for_half_precision_are_refused() -> None:
    g = graph(DIRECT.format(k=32, n=8), a__proj__weight=random(32, 8) + np.float32(1e5))
    QuantizeMatmul(bits=4, block_size=32, zero_point="float").apply(g)
    with pytest.raises(PassError, match="set scale_dtype: fp32"):
        weights_of(g)["a.proj"].parts["codes"].load()


def test_three_bit_file_says_what_it_is() -> None:
    g = two()
    QuantizeMatmul(bits=3, block_size=32).apply(g)
    node = next(node for node in g.nodes if node.op == "MatMul3Bits")
    assert (node.attrs["bits"], node.attrs["block_size"], node.attrs["layout"]) == (3, 32, "nib77")
    assert node.inputs[1].shape == (96, 3, 8)  # three bits: 64 codes in 24 bytes


def test_leaving_everything_alone_is_an_error() -> None:
    with pytest.raises(PassError, match="include and exclude leave none of 2 layers"):
        QuantizeMatmul(bits=4, exclude=("*",)).apply(two())
