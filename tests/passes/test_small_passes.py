"""Passes on embeddings and on nodes that do nothing."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_graphsurgeon as gs
import pytest

from lowbit.passes.base import PassError
from lowbit.passes.lowering.fuse_transpose import FuseTranspose
from lowbit.passes.narrow_embedding import NarrowEmbedding
from lowbit.passes.quant.weights import ArrayWeight
from lowbit.passes.quantize_embedding import QuantizeEmbedding
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.passes.remove_identities import RemoveIdentities
from tests.graphs import dequantized, graph, ops, random, run, weights_of

LOOKUP = "g (int64[m] ids) => (float[m, {h}] y) {{ y = Gather (embed__weight, ids) }}"
IDS = np.array([3, 0, 9], np.int64)


def widened(table: np.ndarray) -> gs.Graph:
    """A half-precision table widened before the lookup, as a bound checkpoint is."""
    g = graph(
        "g (int64[m] ids, float16[10, 32] embed__weight) => (float[m, 32] y)"
        "{ wide = Cast <to = 1> (embed__weight) y = Gather (wide, ids) }"
    )
    old = next(t for t in g.inputs if t.name == "embed.weight")
    constant = gs.Constant("embed.weight", ArrayWeight(table))
    old.outputs[0].inputs[0] = constant
    g.inputs = [t for t in g.inputs if t.name == "ids"]
    return g


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_narrow_embedding_looks_up_before_it_widens(dtype: type) -> None:
    table = random(10, 32).astype(dtype)
    g = widened(table)
    assert NarrowEmbedding().apply(g).rewritten == ("embed",)
    assert ops(g) == ["Gather", "Cast"]
    node = g.nodes[0]
    assert isinstance(node.inputs[0], gs.Constant)
    assert NarrowEmbedding().apply(g).rewritten == ()  # nothing left to do


def test_narrow_embedding_keeps_a_float32_table_unless_told() -> None:
    table = random(10, 32)
    g = graph(LOOKUP.format(h=32), embed__weight=table)
    assert NarrowEmbedding().apply(g).rewritten == ()
    np.testing.assert_array_equal(run(g, ids=IDS)[0], table[IDS])
    assert NarrowEmbedding(dtype="fp16").apply(g).rewritten == ("embed.weight.fp16",)
    np.testing.assert_array_equal(run(g, ids=IDS)[0], table.astype(np.float16).astype(np.float32)[IDS])


@pytest.mark.parametrize("scale_dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantize_embedding_looks_up_what_the_codes_say(bits: int, scale_dtype: str) -> None:
    g = graph(LOOKUP.format(h=64), embed__weight=random(10, 64))
    assert QuantizeEmbedding(bits=bits, block_size=32, scale_dtype=scale_dtype).apply(g).rewritten == ("embed",)
    assert "GatherBlockQuantized" in ops(g)
    expected = dequantized(weights_of(g)["embed"])[IDS]
    np.testing.assert_allclose(run(g, ids=IDS)[0], expected, rtol=1e-6, atol=1e-7)


def test_quantize_embedding_goes_behind_a_cast() -> None:
    g = widened(random(10, 32).astype(np.float16))
    NarrowEmbedding().apply(g)
    QuantizeEmbedding(bits=4, block_size=16).apply(g)
    expected = dequantized(weights_of(g)["embed"])[IDS]
    np.testing.assert_allclose(run(g, ids=IDS)[0], expected, rtol=1e-6, atol=1e-7)


def test_quantize_embedding_refuses() -> None:
    with pytest.raises(PassError, match="embed: rows of 40 do not divide into blocks of 32"):
        QuantizeEmbedding(bits=4, block_size=32).apply(graph(LOOKUP.format(h=40), embed__weight=random(10, 40)))
    with pytest.raises(PassError, match="no Gather reads a constant float table"):
        QuantizeEmbedding(bits=4).apply(graph("g (float[2] x) => (float[2] y) { y = Neg (x) }"))


def test_quantize_embedding_says_when_a_matmul_still_reads_the_table() -> None:
    text = """g (int64[m] ids) => (float[m, 10] y) {
        h = Gather (embed__weight, ids)
        t = Transpose <perm = [1, 0]> (embed__weight)
        y = MatMul (h, t)
    }"""
    g = graph(text, embed__weight=random(10, 32))
    assert "a MatMul still reads the float table" in QuantizeEmbedding(bits=8, block_size=32).apply(g).notes[0]
    next(node for node in g.nodes if node.op == "MatMul").name = "/lm_head/MatMul"


def test_remove_identities_keeps_the_numbers() -> None:
    g = graph(
        """g (float[2, 3] x) => (float[2, 3] y) {
            a = Identity (x)
            b = Cast <to = 1> (a)
            c = Transpose <perm = [1, 0]> (b)
            d = Transpose <perm = [1, 0]> (c)
            e = Transpose <perm = [1, 0]> (d)
            f = Neg (e)
            y = Transpose <perm = [1, 0]> (f)
        }"""
    )
    x = random(2, 3)
    before = run(g, x=x)[0]
    RemoveIdentities().apply(g)
    assert ops(g) == ["Transpose", "Neg", "Transpose"]
    np.testing.assert_array_equal(run(g, x=x)[0], before)


def test_remove_identities_keeps_outputs_and_real_casts() -> None:
    g = graph("g (float[2] x) => (float[2] y, float16[2] z) { y = Identity (x) z = Cast <to = 10> (x) }")
    assert RemoveIdentities().apply(g).rewritten == ()
    assert RemoveIdentities().may_rewrite_nothing
    assert not QuantizeMatmul(bits=4).may_rewrite_nothing


TURNED = "g (float[m, 24] x) => (float[m, 40] y) {{ wt = Transpose <perm = [{perm}]> (w) y = MatMul (x, wt) }}"


def test_fuse_transpose_gives_the_same_bits() -> None:
    x = random(5, 24)
    g = graph(TURNED.format(perm="1, 0"), w=random(40, 24, seed=1))
    before = run(g, x=x)[0]
    assert FuseTranspose().apply(g).rewritten == (g.nodes[0].name,)
    assert ops(g) == ["FusedMatMul"]
    np.testing.assert_array_equal(run(g, x=x)[0], before)


def test_fuse_transpose_leaves_what_is_not_the_transpose_of_a_constant() -> None:
    computed = graph(
        "g (float[m, 24] x, float[40, 24] w) => (float[m, 40] y) { wt = Transpose <perm = [1, 0]> (w) y = MatMul (x, wt) }"
    )
    assert FuseTranspose().apply(computed).rewritten == ()
    straight = graph(TURNED.format(perm="0, 1"), w=random(24, 40))
    assert FuseTranspose().apply(straight).rewritten == ()
    assert ops(straight) == ["Transpose", "MatMul"]
