"""The passes that lower a decoder: on real exports, each keeps the numbers or says what it cannot prove."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from lowbit.passes.base import Pass, PassError
from lowbit.passes.graph.attention import find_attention, find_rotaries
from lowbit.passes.graph.decoder import find_linears, find_norms
from lowbit.passes.lowering.lower_attention import LowerAttention
from lowbit.passes.lowering.lower_interface import LowerInterface
from lowbit.passes.lowering.lower_linear import LowerLinear
from lowbit.passes.lowering.lower_norm import LowerNorm
from lowbit.passes.narrow_embedding import NarrowEmbedding
from lowbit.passes.quantize_embedding import QuantizeEmbedding
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.passes.remove_identities import RemoveIdentities
from lowbit.pipeline.validate.metrics import relative_error
from tests.conftest import Exported
from tests.graphs import graph, ops, random, run
from tests.tiny import LLAMA3

TOKENS = 24
IDS = np.random.default_rng(0).integers(1, 300, (1, TOKENS))

NORM = """g (float[m, 8] x) => (float[m, 8] y) {
    two = Constant <value = float {2}> ()
    square = Pow (x, two)
    axes = Constant <value = int64[1] {-1}> ()
    mean = ReduceMean <keepdims = 1> (square, axes)
    epsilon = Constant <value = float {0.001}> ()
    shifted = Add (mean, epsilon)
    root = Sqrt (shifted)
    one = Constant <value = float {1}> ()
    reciprocal = Div (one, root)
    normed = Mul (x, reciprocal)
    same = Cast <to = 1> (normed)
    y = Mul (a__norm__weight, same)
}"""

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("qwen2", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "dtype": "float32"}),
    (
        "llama",
        {
            "head_dim": 24,
            "rope_theta": 500000.0,
            "rope_scaling": LLAMA3,
        },
    ),
    ("qwen3", {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}),
]


def quantized(g: gs.Graph, *more: Pass) -> gs.Graph:
    for one in (RemoveIdentities(), *(more or (NarrowEmbedding(),))):
        one.apply(g)
    QuantizeMatmul(bits=4, block_size=32, accuracy_level=0).apply(g)
    return g


def decoder_inputs(g: gs.Graph) -> dict[str, np.ndarray]:
    feeds: dict[str, np.ndarray] = {
        t.name: np.zeros((1, t.shape[1], 0, t.shape[3]), np.float32) for t in g.inputs if t.name.startswith("past")
    }
    positions = np.arange(TOKENS)[None]
    return feeds | {"input_ids": IDS, "attention_mask": np.ones_like(IDS), "position_ids": positions}


def lowered_inputs(table: np.ndarray, index: int = 0) -> dict[str, np.ndarray]:
    return {
        "input_ids": table[IDS[0]].astype(np.float32)[:, None],
        "attention_mask": np.triu(np.full((1, 1, TOKENS, TOKENS), np.finfo(np.float32).min, np.float32), 1),
        "position_ids": np.arange(TOKENS, dtype=np.int32)[None],
        "logits_index": np.array([index], np.int32),
    }


@pytest.mark.parametrize(("kind", "options"), FAMILIES, ids=["qwen2", "llama-tied-biased", "llama3-rope", "qwen3"])
def test_the_lowered_graph_computes_the_same_logits(exported: Exported, kind: str, options: dict[str, Any]) -> None:
    checkpoint, g = exported(kind, **options)
    quantized(g)
    names = [t.name for t in g.outputs]
    expected = run(g, **decoder_inputs(g))[names.index("logits")]
    for lowering in (LowerNorm(), LowerAttention(), LowerInterface()):
        assert lowering.apply(g).rewritten
    assert [t.name for t in g.inputs] == ["input_ids", "attention_mask", "position_ids", "logits_index"]
    assert ops(g).count("Attention") == ops(g).count("RoPE") + ops(g).count("NormedRoPE") == 2
    table = checkpoint.weights["model.embed_tokens.weight"].load()
    assert relative_error(run(g, **lowered_inputs(table))[0], expected) < 1e-5
    assert relative_error(run(g, **lowered_inputs(table, -1))[0], expected[:, -1:]) < 1e-5


def test_lower_linear_leaves_placeholders_and_pads_ragged_inputs(exported: Exported) -> None:
    _, g = exported("llama", intermediate_size=172, dtype="float16")
    quantized(g)
    for lowering in (LowerNorm(), LowerAttention(), LowerInterface()):
        lowering.apply(g)
    outcome = LowerLinear().apply(g)
    assert outcome.notes[0] == "model.layers.0.mlp.down_proj: 172 inputs padded with zeros to 192, whole blocks of 32"
    assert {"MatMulNBits", "MatMul"} & set(ops(g)) == set()
    down = next(n for n in g.nodes if n.name == "model.layers.0.mlp.down_proj")
    assert (down.attrs, down.inputs[0].inputs[0].op) == ({"ic": 192, "oc": 64}, "Pad")
    assert [t.name for t in g.outputs] == ["logits"]


def test_lower_interface_takes_a_quantized_embedding(exported: Exported) -> None:
    _, g = exported("qwen2")
    quantized(g, QuantizeEmbedding(bits=8, block_size=32))
    for lowering in (LowerNorm(), LowerAttention(), LowerInterface()):
        lowering.apply(g)
    assert "GatherBlockQuantized" not in ops(g)
    assert g.inputs[0].shape == ["tokens", 1, 64]


def test_norms_of_heads_go_into_the_rotary_node(exported: Exported) -> None:
    _, g = exported("qwen3")
    quantized(g)
    gamma = next(t for t in g.tensors().values() if t.name == "model.layers.1.self_attn.k_norm.weight")._values.load()
    for lowering in (LowerNorm(), LowerAttention(), LowerInterface()):
        lowering.apply(g)
    ropes = [node for node in g.nodes if node.op == "NormedRoPE"]
    assert len(ropes) == 2
    assert ropes[1].attrs["k_gamma"] == gamma.astype(np.float32).tolist()
    assert not [t for t in g.tensors() if "k_norm" in t]


@pytest.mark.parametrize(
    ("renamed", "message"),
    [
        (["q"], "norms queries or keys alone"),
        (["q", "k"], r"the rotated heads come from .*q_norm.*a norm between them"),
    ],
)
def test_another_norm_of_heads_is_refused(exported: Exported, renamed: list[str], message: str) -> None:
    _, g = exported("qwen3")
    quantized(g)
    for part in renamed:
        gamma = next(t for t in g.tensors().values() if t.name == f"model.layers.0.self_attn.{part}_norm.weight")
        gamma.name = f"other.{part}_norm.weight"
    with pytest.raises(PassError, match=f"model.layers.0.self_attn: {message}"):
        LowerAttention().apply(g)


def test_a_float_layer_is_refused_with_what_would_be_right(exported: Exported) -> None:
    _, g = exported("qwen2")
    QuantizeMatmul(bits=4, block_size=32, exclude=("lm_head",)).apply(g)
    with pytest.raises(PassError, match=r"multiplies by the float weight 'lm_head'.*include: \['lm_head'\]"):
        LowerAttention().apply(g)


def test_graphs_that_are_no_decoder_are_refused() -> None:
    g = graph("g (float[2, 32] x) => (float[2, 32] y) { y = MatMul (x, a__weight) }", a__weight=random(32, 32))
    with pytest.raises(PassError, match="no Cos and Sin for rotary tables"):
        LowerAttention().apply(g)
    with pytest.raises(PassError, match="no RMSNorm found"):
        LowerNorm().apply(g)
    with pytest.raises(PassError, match="expected one lookup of input_ids"):
        LowerInterface().apply(g)
    QuantizeMatmul(bits=4, block_size=32).apply(g)
    with pytest.raises(PassError, match=r"no layer has a quantized self_attn.q_proj"):
        find_attention(g, find_linears(g), [])
    with pytest.raises(PassError, match="no quantized MatMul"):
        LowerLinear().apply(graph("g (float[2] x) => (float[2] y) { y = Neg (x) }"))


def test_lower_norm_keeps_the_numbers_and_drops_casts() -> None:
    g = graph(NORM, a__norm__weight=random(8) + 1)
    x = random(5, 8, seed=1)
    before = run(g, x=x)[0]
    assert LowerNorm().apply(g).rewritten == ("a.norm.weight",)
    assert "Cast" not in ops(g)
    np.testing.assert_allclose(run(g, x=x)[0], before, rtol=1e-6)
    assert find_norms(g)[0].epsilon == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("{2}", "{3}", "is not a square"),
        ("int64[1] {-1}", "int64[1] {0}", "averages over axes"),
        ("{1}", "{2}", "is not 1 / root"),
        ("Sqrt (shifted)", "Exp (shifted)", "expected Sqrt, found Exp"),
        ("Pow (x, two)", "Pow (two, two)", "of another tensor than is normed"),
        ("y = Mul (a__norm__weight, same)", "y = Sub (a__norm__weight, same)", "expected one Mul"),
        ("normed = Mul (x, reciprocal)", "normed = Add (x, reciprocal)", "no Mul by the reciprocal root"),
        ("normed = Mul (x, reciprocal)", "normed = Mul (x, x)", "does not multiply by one reciprocal root"),
        ("shifted = Add (mean, epsilon)", "shifted = Add (epsilon, epsilon)", "does not add one constant epsilon"),
    ],
)
def test_what_is_no_rms_norm_is_refused(old: str, new: str, reason: str) -> None:
    assert old in NORM
    with pytest.raises(PassError, match=reason):
        LowerNorm().apply(graph(NORM.replace(old, new, 1), a__norm__weight=random(8)))


def _attention_nodes(g: gs.Graph, op: str) -> list[gs.Node]:
    return [n for n in g.nodes if n.op == op and "/layers.0/self_attn/" in n.name]


def _swap_halves(g: gs.Graph) -> None:
    concat = next(n for n in _attention_nodes(g, "Concat") if n.inputs[0].inputs and n.inputs[0].inputs[0].op == "Neg")
    concat.inputs = [concat.inputs[1], concat.inputs[0]]


def _drop_mask(g: gs.Graph) -> None:
    softmax = _attention_nodes(g, "Softmax")[0]
    add = softmax.inputs[0].inputs[0]
    softmax.inputs[0] = next(t for t in add.inputs if t.inputs and t.inputs[0].op == "MatMul")


def _other_rotary(g: gs.Graph) -> None:
    mul = next(n for n in _attention_nodes(g, "Mul") if n.name.endswith("self_attn/Mul"))
    mul.inputs[1] = gs.Constant("odd", np.ones((1, 1, 1, 1), np.float32))


def _second_cos(g: gs.Graph) -> None:
    cos = next(n for n in g.nodes if n.op == "Cos")
    g.nodes.append(gs.Node("Cos", "extra", {}, [cos.inputs[0]], [gs.Variable("extra", np.float32)]))


def _scale_sin(g: gs.Graph) -> None:
    sin = next(n for n in g.nodes if n.op == "Sin")
    out, scaled = sin.outputs[0], gs.Variable("scaled_sin", np.float32)
    for reader in list(out.outputs):
        reader.inputs = [scaled if t is out else t for t in reader.inputs]
    g.nodes.append(gs.Node("Mul", "scale_sin", {}, [out, gs.Constant("half", np.array(0.5, np.float32))], [scaled]))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_swap_halves, "expected Neg, found Slice"),
        (_drop_mask, "does not read .*attention_mask|expected Add, found MatMul"),
        (_other_rotary, "not a rotary embedding|multiplies"),
        (_second_cos, "reads .position_ids., which plain attention does not"),
    ],
)
def test_attention_that_is_not_what_it_seems_is_refused(exported: Exported, damage: Any, reason: str) -> None:
    _, g = exported("qwen2")
    quantized(g)
    damage(g)
    with pytest.raises(PassError, match=reason):
        LowerAttention().apply(g)


def test_partial_rotary_and_odd_heads_are_refused(exported: Exported) -> None:
    _, g = exported("qwen2")
    quantized(g)
    rotaries, linears = find_rotaries(g), find_linears(g)
    next(t for t in g.inputs if t.name == "past_key_values.0.key").shape = ["b", 3, "p", 16]
    with pytest.raises(PassError, match="do not fit 3 key/value heads of 16"):
        find_attention(g, linears, rotaries)


def test_scaled_rotary_tables_are_found(exported: Exported) -> None:
    _, g = exported("qwen2")
    with pytest.raises(PassError, match="cos and sin are scaled differently"):
        _scale_sin(g)
        find_rotaries(g)
