"""The passes that fuse a decoder for onnxruntime: they fire, they keep the numbers, they say what they leave alone."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from lowbit.passes.base import PassError
from lowbit.passes.graph.quantized_ops import quantized_matmuls
from lowbit.passes.lowering.fuse_attention import FuseAttention
from lowbit.passes.lowering.fuse_norm import FuseNorm
from lowbit.passes.lowering.pack_projections import PackProjections
from lowbit.passes.narrow_embedding import NarrowEmbedding
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.passes.remove_identities import RemoveIdentities
from lowbit.passes.split_projections import SplitProjections
from lowbit.pipeline.checkpoint.config import sliding_windows
from lowbit.pipeline.runtime.session import decoder_feeds
from tests.conftest import Exported
from tests.graphs import graph, ops, random, run, weights_of

IDS = np.random.default_rng(0).integers(1, 300, (2, 20))
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("qwen2", {}),
    "window in one layer": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "window": ("mistral", {"sliding_window": 4}),
    "head norms": ("qwen3", {"head_dim": 32}),
    "norms of all features": ("olmo2", {}),
    "layers without rotation": ("smollm3", {}),
    "partial rotation, window": (
        "phi3",
        {"head_dim": 32, "partial_rotary_factor": 0.5, "sliding_window": 4, "hidden_size": 128},
    ),
    "1 + weight": ("gemma", {}),
    "capped scores": ("gemma2", {"sliding_window": 4}),
    "two rotary tables": ("gemma3", {}),
    "scaled logits": ("granite", {}),
}


def quantized(exported: Exported, kind: str, options: dict[str, Any]) -> tuple[gs.Graph, tuple[int, ...]]:
    checkpoint, g = exported(kind, **options)
    for one in (RemoveIdentities(), NarrowEmbedding()):
        one.apply(g)
    if kind == "phi3":
        SplitProjections().apply(g)
    QuantizeMatmul(bits=4, block_size=32, accuracy_level=0).apply(g)
    return g, sliding_windows(checkpoint)


def decoded(g: gs.Graph, check: bool) -> list[np.ndarray]:
    """Logits of twelve tokens at once, then of four more, one by one on the cache."""
    names = [tensor.name for tensor in g.outputs]
    found, past, start = [], None, 0
    for stop in (12, 13, 14, 15, 16):
        results = dict(zip(names, run(g, check=check, **decoder_feeds(g, IDS[:, start:stop], past)), strict=True))
        found.append(results.pop("logits"))
        past, start = {name.replace("present", "past_key_values"): value for name, value in results.items()}, stop
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_fused_graphs_compute_the_same(exported: Exported, family: str) -> None:
    g, windows = quantized(exported, *FAMILIES[family])
    expected = decoded(g, check=True)
    layers = sum(t.name.endswith(".key") for t in g.inputs)
    fused = FuseAttention(max_length=256, windows=windows).apply(g)
    assert len(fused.rewritten) == layers
    FuseNorm().apply(g)
    count = Counter(ops(g))
    assert count["GroupQueryAttention"] == layers
    assert not {"Softmax", "Cos", "Pow", "ReduceMean"} & set(count)
    for found, wanted in zip(decoded(g, check=False), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    PackProjections().apply(g)
    for found, wanted in zip(decoded(g, check=False), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)


def test_a_window_that_is_forgotten_shows(exported: Exported) -> None:
    g, _ = quantized(exported, *FAMILIES["window"])
    expected = decoded(g, check=True)[0]
    FuseAttention(max_length=256).apply(g)
    assert np.abs(decoded(g, check=False)[0] - expected).max() > 1e-2 * np.abs(expected).max()


def test_skips_are_fused_with_their_norms(exported: Exported) -> None:
    g, _ = quantized(exported, "qwen2", {})
    FuseNorm().apply(g)
    count = Counter(ops(g))
    assert count["SimplifiedLayerNormalization"] == 1, "the first norm reads the embedding alone"
    assert count["SkipSimplifiedLayerNormalization"] == 4
    with pytest.raises(PassError, match="no RMSNorm found"):
        FuseNorm().apply(graph("g (float[2] x) => (float[2] y) { y = Neg (x) }"))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero_point", ["symmetric", "integer", "float"])
def test_packed_projections_have_the_rows_of_all_three(exported: Exported, bits: Any, zero_point: Any) -> None:
    if bits == 8 and zero_point == "float":
        pytest.skip("refused by quantize_matmul")
    _, g = exported("qwen2")
    RemoveIdentities().apply(g)
    form = {"symmetric": True} if zero_point == "symmetric" else {"zero_point": zero_point}
    QuantizeMatmul(bits=bits, block_size=32, accuracy_level=0, **form).apply(g)
    before = weights_of(g)
    FuseAttention(max_length=256).apply(g)
    FuseNorm().apply(g)
    expected = decoded(g, check=False)
    outcome = PackProjections().apply(g)
    assert outcome.rewritten == ("model.layers.0.self_attn", "model.layers.1.self_attn")
    packed = {weight.name: weight for _, weight in quantized_matmuls(g)}
    assert len(packed) == len(before) - 4
    for part in packed["model.layers.0.self_attn.qkv_proj"].parts:
        rows = [before[f"model.layers.0.self_attn.{one}_proj"].parts[part].load() for one in "qkv"]
        whole = packed["model.layers.0.self_attn.qkv_proj"].parts[part].load()
        np.testing.assert_array_equal(whole, np.concatenate(rows))
    for found, wanted in zip(decoded(g, check=False), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max(), rtol=0)


def test_projections_that_differ_stay_apart(exported: Exported) -> None:
    _, g = exported("qwen2")
    RemoveIdentities().apply(g)
    QuantizeMatmul(bits=8, block_size=32, include=("*.0.*.k_proj",)).apply(g)
    QuantizeMatmul(bits=4, block_size=32).apply(g)
    FuseAttention(max_length=256).apply(g)
    outcome = PackProjections().apply(g)
    assert outcome.rewritten == ("model.layers.1.self_attn",)
    assert outcome.skipped == {"model.layers.0.self_attn": "its projections differ in bits, blocks, arithmetic or input"}


def test_normed_heads_are_not_packed(exported: Exported) -> None:
    g, _ = quantized(exported, *FAMILIES["head norms"])
    FuseAttention(max_length=256).apply(g)
    outcome = PackProjections().apply(g)
    assert not outcome.rewritten
    assert set(outcome.skipped.values()) == {"something stands between its projections and itself"}


def test_fused_projections_are_split_and_keep_the_numbers(exported: Exported) -> None:
    _, g = exported("phi3")
    expected = decoded(g, check=True)
    outcome = SplitProjections().apply(g)
    names = [f"self_attn.{one}_proj" for one in "qkv"] + ["mlp.gate_proj", "mlp.up_proj"]
    assert sorted(outcome.rewritten) == sorted(f"model.layers.{i}.{name}" for i in range(2) for name in names)
    for found, wanted in zip(decoded(g, check=True), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6 * np.abs(wanted).max(), rtol=0)
    QuantizeMatmul(bits=4, block_size=32, include=("*.q_proj",)).apply(g)
    with pytest.raises(PassError, match="no MatMul by a weight called qkv_proj or gate_up_proj"):
        SplitProjections().apply(g)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("p = MatMul (x, a__qkv_proj__weight) y = Neg (p)", r"its product is read by \['Neg'\], expected 3 Slices"),
        (
            "p = MatMul (x, a__qkv_proj__weight) a = Slice (p, n0, n2, last) b = Slice (p, n3, n4, last) "
            "c = Slice (p, n4, n6, last) y = Concat <axis = 1> (a, b, c)",
            "not cut into parts that follow each other",
        ),
    ],
)
def test_projections_that_are_cut_otherwise_are_refused(text: str, reason: str) -> None:
    numbers = " ".join(f"n{i} = Constant <value = int64[1] {{{i}}}> ()" for i in (0, 2, 3, 4, 6))
    body = f"{numbers} last = Constant <value = int64[1] {{-1}}> () {text}"
    g = graph(f"g (float[2, 32] x) => (float[2, n] y) {{ {body} }}", a__qkv_proj__weight=random(32, 6))
    with pytest.raises(PassError, match=reason):
        SplitProjections().apply(g)
