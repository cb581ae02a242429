"""Passes for graphs of any kind: Gemm split, tokens pooled, quantized MatMuls lowered whatever the rank of their input."""

from __future__ import annotations

import numpy as np
import pytest

from lowbit.passes.base import PassError
from lowbit.passes.lowering.lower_matmul import LowerMatmul
from lowbit.passes.pool_tokens import PoolTokens
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.passes.split_gemm import SplitGemm
from tests.graphs import graph, ops, random, run


@pytest.mark.parametrize(
    ("gemm", "shape"),
    [("Gemm (x, a__weight, b)", (32, 8)), ("Gemm <transB = 1> (x, a__weight, b)", (8, 32)), ("Gemm (x, a__weight)", (32, 8))],
)
def test_gemm_becomes_matmul_and_add(gemm: str, shape: tuple[int, int]) -> None:
    text = f"g (float[n, 32] x) => (float[n, 8] y) {{ y = {gemm} }}"
    g = graph(text, a__weight=random(*shape), b=random(8, seed=1))
    x = random(5, 32, seed=2)
    expected = run(g, x=x)[0]
    assert len(SplitGemm().apply(g).rewritten) == 1
    assert "Gemm" not in ops(g)
    np.testing.assert_allclose(run(g, x=x)[0], expected, atol=1e-5, rtol=0)
    assert QuantizeMatmul(bits=4, block_size=32).apply(g).rewritten == ("a",)


def test_gemm_that_scales_is_left_alone() -> None:
    text = "g (float[n, 32] x) => (float[n, 8] y) { y = Gemm <alpha = 0.5> (x, a__weight) }"
    g = graph(text, a__weight=random(32, 8))
    outcome = SplitGemm().apply(g)
    assert list(outcome.skipped.values()) == ["it transposes its first operand or scales"]
    assert ops(g) == ["Gemm"]


HIDDEN = (
    "g (float[b, t, 8] x, int64[b, t] attention_mask) => (float[b, t, 8] last_hidden_state) { last_hidden_state = Neg (x) }"
)


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_tokens_are_pooled(mode: str, normalize: bool) -> None:
    g = graph(HIDDEN)
    outcome = PoolTokens(mode=mode, normalize=normalize).apply(g)  # type: ignore[arg-type]
    assert outcome.rewritten == ("sentence_embedding",)
    x, mask = random(2, 5, 8), np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    found = run(g, x=x, attention_mask=mask)[0]
    expected = np.stack([-x[0].mean(0), -x[1, :2].mean(0)]) if mode == "mean" else -x[:, 0]
    if normalize:
        expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6, rtol=0)


def test_what_cannot_be_pooled_is_refused() -> None:
    with pytest.raises(PassError, match="there is no output last_hidden_state to pool; the graph has y"):
        PoolTokens().apply(graph("g (float[2] x) => (float[2] y) { y = Neg (x) }"))
    text = "g (float[b, t, 8] x) => (float[b, t, 8] last_hidden_state) { last_hidden_state = Neg (x) }"
    with pytest.raises(PassError, match="needs the input attention_mask"):
        PoolTokens().apply(graph(text))


def test_matmuls_of_any_rank_become_rows() -> None:
    text = """g (float[n, 40] x, float[b, t, 40] z) => (float[n, 8] u, float[b, t, 16] v) {
        u = MatMul (x, a__weight)
        v = MatMul (z, c__weight)
    }"""
    g = graph(text, a__weight=random(40, 8), c__weight=random(40, 16, seed=1))
    QuantizeMatmul(bits=4, block_size=32).apply(g)
    outcome = LowerMatmul().apply(g)
    assert outcome.rewritten == ("a", "c")
    assert outcome.notes[0] == "a: 40 inputs padded with zeros to 64, whole blocks of 32"
    linears = {node.name: node for node in g.nodes if node.op == "Linear"}
    assert {name: dict(node.attrs) for name, node in linears.items()} == {"a": {"ic": 64, "oc": 8}, "c": {"ic": 64, "oc": 16}}
    with pytest.raises(PassError, match="no quantized MatMul found"):
        LowerMatmul().apply(graph("g (float[2] x) => (float[2] y) { y = Neg (x) }"))
