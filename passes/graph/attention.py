"""Attention of a decoder graph as optimum exports it, its whole region proven; and the rotary tables it reads."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from lowbit.passes.base import PassError
from lowbit.passes.graph.decoder import VIEWS, Linear, Norm, expect, find_norms, leaves_of, made_by, need
from lowbit.passes.graph.match import SAME_VALUE, behind, constant_value, producer, readers


@dataclass(frozen=True, eq=False)
class Rotary:
    """The tables of rotary position embedding: cos and sin of position * inv_freq, both halves alike.

    Attributes:
        inv_freq: float32 [head_dim / 2], as baked into the graph.
        scaling: factor on both tables (YaRN's attention scaling; 1 otherwise).
        cos, sin: the tensors that the layers read.
    """

    inv_freq: npt.NDArray[np.float32]
    scaling: float
    cos: gs.Tensor
    sin: gs.Tensor


def find_rotaries(graph: gs.Graph) -> list[Rotary]:
    """Every pair of rotary tables of the graph; Gemma 3 has two."""
    cosines, sines = ({id(behind(n.inputs[0])): n for n in graph.nodes if n.op == op} for op in ("Cos", "Sin"))
    need(cosines and sines, "no Cos and Sin for rotary tables: not a decoder that this pass knows.")
    need(set(cosines) == set(sines), "cos and sin are taken of different angles.")
    return [_rotary(cosines[angle], sines[angle]) for angle in cosines]


def _rotary(cos: gs.Node, sin: gs.Node) -> Rotary:
    angle = behind(cos.inputs[0])
    scale_cos, cos_table = _scaled(cos.outputs[0])
    scale_sin, sin_table = _scaled(sin.outputs[0])
    need(scale_cos == scale_sin, "cos and sin are scaled differently.")
    halves = made_by(angle, "rotary angles", "Concat")
    need(halves.inputs[0] is halves.inputs[1], "rotary angles are not two equal halves (interleaved RoPE?).")
    product = producer(behind(halves.inputs[0], SAME_VALUE | {"Transpose"}))
    if product is None or product.op not in ("MatMul", "Mul"):
        raise PassError("rotary angles are not a product of positions.")
    constants = [v for t in product.inputs if (v := constant_value(behind(t, VIEWS))) is not None]
    need(len(constants) == 1, "inv_freq is not a constant (dynamic RoPE?).")
    operand = next(t for t in product.inputs if constant_value(behind(t, VIEWS)) is None)
    others = {name for name, leaf in leaves_of(operand, []).items() if constant_value(leaf) is None}
    counted = others == {"position_ids"} or (not others and _counts(operand))
    need(counted, "rotary angles do not read position_ids, nor do they count positions.")
    return Rotary(np.asarray(constants[0], np.float32).reshape(-1), scale_cos, cos_table, sin_table)


def _counts(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a Range, as Gemma's graphs count positions, behind views."""
    node = producer(behind(tensor, VIEWS | {"Add"}))
    return node is not None and node.op == "Range"


def _scaled(table: gs.Tensor) -> tuple[float, gs.Tensor]:
    """The factor that is multiplied onto a rotary table, and the tensor after it."""
    factor = 1.0
    while True:
        after = readers(table)
        inputs = list(after[0].inputs) if len(after) == 1 and after[0].op == "Mul" else []
        scalars = [v for t in inputs if (v := constant_value(t)) is not None and v.size == 1]
        if not scalars:
            return factor, table
        factor *= float(scalars[0].reshape(-1)[0])
        table = after[0].outputs[0]


@dataclass(frozen=True, eq=False)
class Attention:
    """Causal grouped-query attention of one layer, from its projections to the input of o_proj.

    Attributes:
        softcap: scores become softcap * tanh(scores / softcap); 0 where they are not capped.
        rotary: the tables that queries and keys are rotated by, their first dimensions where the tables have fewer than a
            head; None where they are not rotated.
        q_norm, k_norm: RMSNorm of queries and keys before that, of each head or of all features, where there are any.
    """

    layer: int
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    rotary: Rotary | None
    q_norm: Norm | None
    k_norm: Norm | None


def find_attention(graph: gs.Graph, linears: dict[str, Linear], rotaries: list[Rotary]) -> list[Attention]:
    """The attention of every layer, its whole region proven."""
    fused = next((name for name in linears if name.endswith((".qkv_proj", ".query_key_value", ".Wqkv"))), None)
    need(fused is None, f"{fused} makes queries, keys and values in one; put split_projections before quantize_matmul.")
    layers = [name.removesuffix(".self_attn.q_proj") for name in linears if name.endswith(".self_attn.q_proj")]
    need(layers, "no layer has a quantized self_attn.q_proj: not a decoder that this pass knows.")
    inputs = {t.name: t for t in graph.inputs}
    norms = {norm.gamma.name: norm for norm in find_norms(graph)}
    return [_attention(prefix, linears, rotaries, inputs, norms) for prefix in layers]


def _attention(
    prefix: str, linears: dict[str, Linear], rotaries: list[Rotary], inputs: dict[str, gs.Tensor], norms: dict[str, Norm]
) -> Attention:
    layer = int(prefix.rpartition(".")[2])
    where = f"{prefix}.self_attn"
    for part in "qkvo":
        need(f"{where}.{part}_proj" in linears, f"{where}: has no quantized {part}_proj.")
    q, k, v, o = (linears[f"{where}.{part}_proj"] for part in "qkvo")
    cache = f"past_key_values.{layer}"
    past_key = expect(inputs.get(f"{cache}.key"), f"{where}: the graph has no input {cache}.key.")
    kv_heads, head_dim = int(past_key.shape[1]), int(past_key.shape[3])
    sizes = [linear.weight.source.shape[0] for linear in (q, k, v)] + [o.weight.source.shape[1]]
    heads = sizes[0] // head_dim
    need(
        sizes == [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, heads * head_dim] and heads % kv_heads == 0,
        f"{where}: projections of {sizes} features do not fit {kv_heads} key/value heads of {head_dim}.",
    )
    tables = [table for rotary in rotaries for table in (rotary.cos, rotary.sin)]
    leaves = leaves_of(o.x, [q.y, k.y, v.y, *tables])
    read = [rotary for rotary in rotaries if rotary.cos.name in leaves or rotary.sin.name in leaves]
    need(len(read) <= 1, f"{where}: reads {len(read)} pairs of rotary tables, expected one.")
    rotary = read[0] if read else None
    must = {q.y.name, k.y.name, v.y.name, "attention_mask"}
    may = must | {f"{cache}.key", f"{cache}.value"} | {table.name for table in tables}
    for name, leaf in leaves.items():
        known = name in may or constant_value(leaf) is not None
        need(known, f"{where}: reads '{name}', which plain attention does not.")
    need(must <= set(leaves), f"{where}: does not read {sorted(must - set(leaves))}.")
    q_norm = _own_norm(norms.get(f"{where}.q_norm.weight"), q, head_dim)
    k_norm = _own_norm(norms.get(f"{where}.k_norm.weight"), k, head_dim)
    need((q_norm is None) == (k_norm is None), f"{where}: norms queries or keys alone.")
    queries, keys = (linear.y if norm is None else norm.y for linear, norm in ((q, q_norm), (k, k_norm)))
    scale, softcap = _check_scores(where, o, queries, keys, rotary, past_key)
    return Attention(layer, q, k, v, o, heads, kv_heads, head_dim, scale, softcap, rotary, q_norm, k_norm)


def _own_norm(norm: Norm | None, linear: Linear, head_dim: int) -> Norm | None:
    """The norm of a projection's heads, or of all its features, proven to be one; None if there is none."""
    if norm is None:
        return None
    name = norm.gamma.name
    (size,), features = norm.gamma.shape, linear.weight.source.shape[0]
    need(size in (head_dim, features), f"{name}: norms {size} features, a head has {head_dim} and all have {features}.")
    origin = behind(norm.x, VIEWS)
    need(origin is behind(linear.y), f"{name}: norms '{origin.name}', expected those of '{linear.y.name}'.")
    return norm


def _check_scores(
    where: str, o: Linear, q: gs.Tensor, k: gs.Tensor, rotary: Rotary | None, past: gs.Tensor
) -> tuple[float, float]:
    """Prove softmax(cap(rope(q) rope([past, k])^T * scale) + mask); returns the scale and the cap."""
    weighted = made_by(behind(o.x, VIEWS), where, "MatMul")
    probabilities = _unguarded(weighted.inputs[0])
    softmax = made_by(probabilities, where, "Softmax")
    need(softmax.attrs.get("axis", -1) in (-1, 3), f"{where}: '{softmax.name}' normalizes axis {softmax.attrs.get('axis')}.")
    masked = made_by(softmax.inputs[0], where, "Add")
    products = [scores for scores in map(_scores, masked.inputs) if scores is not None]
    need(len(products) == 1, f"{where}: '{masked.name}' does not add a mask to one product of queries and keys.")
    product, scale, softcap = products[0]
    q_scale, query = _unscaled(product.inputs[0])
    k_scale, key = _unscaled(product.inputs[1])
    _check_rope(where, query, q, rotary)
    cache = made_by(behind(key, VIEWS), where, "Concat")
    need(behind(cache.inputs[0]) is past, f"{where}: '{cache.name}' does not append to {past.name}.")
    _check_rope(where, cache.inputs[1], k, rotary)
    return scale * q_scale * k_scale, softcap


def _scores(tensor: gs.Tensor) -> tuple[gs.Node, float, float] | None:
    """The product behind scores, what it is multiplied by, and the cap on that (0: none); None if there is no product."""
    factor, inner = _unscaled(tensor)
    node, softcap = producer(inner), 0.0
    if node is not None and node.op == "Tanh":
        softcap = factor
        factor, inner = _unscaled(node.inputs[0])
        factor, node = factor * softcap, producer(inner)
    return None if node is None or node.op != "MatMul" else (node, factor, softcap)


def _unguarded(tensor: gs.Tensor) -> gs.Tensor:
    """The tensor behind the guard against fully masked rows: Where(IsNaN(p), 0, p)."""
    node = producer(behind(tensor))
    if node is not None and node.op == "Where":
        guard = producer(behind(node.inputs[0]))
        if guard is not None and guard.op == "IsNaN" and behind(guard.inputs[0]) is behind(node.inputs[2]):
            return behind(node.inputs[2])
    return behind(tensor)


def _unscaled(tensor: gs.Tensor) -> tuple[float, gs.Tensor]:
    """The product of scalar constants multiplied onto a tensor, and the tensor before them and transposes."""
    factor = 1.0
    while True:
        tensor = behind(tensor)
        node = producer(tensor)
        if node is None or node.op not in ("Mul", "Div", "Transpose"):
            return factor, tensor
        if node.op == "Transpose":
            tensor = node.inputs[0]
            continue
        values = [constant_value(t) for t in node.inputs]
        scalars = [i for i, v in enumerate(values) if v is not None and v.size == 1]
        if len(scalars) != 1:
            return factor, tensor
        value = float(np.asarray(values[scalars[0]]).reshape(-1)[0])
        factor = factor * value if node.op == "Mul" else factor / value
        tensor = node.inputs[1 - scalars[0]]


def _check_rope(where: str, tensor: gs.Tensor, source: gs.Tensor, rotary: Rotary | None) -> None:
    """Prove that the heads of `source` are rotated, all their dimensions or the first, or handed on as they are."""
    whole = producer(behind(tensor))
    if rotary is None:
        origin = behind(tensor, VIEWS)
        need(origin is behind(source), f"{where}: its heads come from '{origin.name}', expected '{source.name}'.")
        return
    if whole is not None and whole.op == "Concat" and len(whole.inputs) == 2:
        rest = behind(whole.inputs[1], VIEWS | {"Slice"})
        need(rest is behind(source), f"{where}: what is not rotated comes from '{rest.name}', expected '{source.name}'.")
        tensor = whole.inputs[0]
    x = _rotated(where, tensor, rotary)
    origin = behind(x, VIEWS | {"Slice"})
    need(
        origin is behind(source),
        f"{where}: the rotated heads come from '{origin.name}', expected '{source.name}' (a norm between them?).",
    )


def _rotated(where: str, tensor: gs.Tensor, rotary: Rotary) -> gs.Tensor:
    """Prove tensor = x * cos + concat(-x[half:], x[:half]) * sin; returns x."""
    total = producer(behind(tensor))
    if total is None or total.op != "Add":
        maker = "nothing" if total is None else total.op
        raise PassError(f"{where}: its queries or keys are not rotated (made by {maker}, not by an Add).")
    terms = [made_by(t, where, "Mul") for t in total.inputs]
    views = SAME_VALUE | {"Unsqueeze"}

    def operand(node: gs.Node, table: gs.Tensor) -> gs.Tensor | None:
        others = [t for t in node.inputs if behind(t, views) is not behind(table)]
        return others[0] if len(others) == 1 else None

    operands = [(operand(a, rotary.cos), operand(b, rotary.sin)) for a, b in (terms, terms[::-1])]
    pairs = [(x, turned) for x, turned in operands if x is not None and turned is not None]
    need(len(pairs) == 1, f"{where}: '{total.name}' is not a rotary embedding with the graph's cos and sin.")
    x, turned = pairs[0]
    halves = made_by(turned, where, "Concat")
    upper = made_by(made_by(halves.inputs[0], where, "Neg").inputs[0], where, "Slice")
    lower = made_by(halves.inputs[1], where, "Slice")
    same = all(behind(part.inputs[0]) is behind(x) for part in (upper, lower))
    need(same, f"{where}: '{halves.name}' does not turn the halves of the same heads.")
    return x
