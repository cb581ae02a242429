"""The parts of a decoder graph as optimum exports it, each found by weight names and proven by its nodes.

A part is anchored on weights, and every node between its ends is checked before anything is replaced; what
does not fit raises `PassError` with the node and the reason.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from passes._match import SAME_VALUE, behind, constant_value, producer, readers, repeats
from passes._ops import quantized_weight
from passes._quantized import QuantizedWeight
from passes._weights import weight_of
from passes.base import PassError

VIEWS = SAME_VALUE | {"Unsqueeze", "Reshape", "Expand", "Transpose"}
"""Operators that move values about without changing any."""


def need(condition: object, message: str) -> None:
    """Raise `PassError` unless the condition holds."""
    if not condition:
        raise PassError(message)


@dataclass(frozen=True, eq=False)
class Linear:
    """A quantized MatMul and the bias behind it: x [..., K] -> y [..., N]."""

    weight: QuantizedWeight
    node: gs.Node
    bias: gs.Constant | None
    x: gs.Tensor
    y: gs.Tensor


def find_linears(graph: gs.Graph) -> dict[str, Linear]:
    """Every quantized MatMul by layer name; a MatMul by a float weight is refused."""
    found = {}
    for node in graph.nodes:
        if node.op == "MatMul" and constant_matrix(node.inputs[1]) is not None:
            name = str(constant_matrix(node.inputs[1])).removesuffix(".weight")
            raise PassError(
                f"'{node.name}' multiplies by the float weight '{name}'. MNN gets codes only: quantize it too, with "
                f"quantize_matmul {{bits: 8, include: ['{name}']}} if it must stay accurate."
            )
        weight = quantized_weight(node)
        if weight is None or node.op == "GatherBlockQuantized":
            continue
        y, bias = node.outputs[0], None
        after = list(y.outputs)
        if len(after) == 1 and after[0].op == "Add":
            other = behind(next(t for t in after[0].inputs if t is not y))
            if isinstance(other, gs.Constant) and other.name.endswith(".bias"):
                y, bias = after[0].outputs[0], other
        found[weight.name] = Linear(weight, node, bias, node.inputs[0], y)
    return found


def constant_matrix(tensor: gs.Tensor) -> str | None:
    """The name of the constant [rows, columns] behind views and casts, or None."""
    tensor = behind(tensor, SAME_VALUE | {"Transpose"})
    return tensor.name if isinstance(tensor, gs.Constant) and len(tensor.shape) == 2 and min(tensor.shape) > 1 else None


@dataclass(frozen=True, eq=False)
class Norm:
    """RMSNorm: y = x / sqrt(mean(x^2) + epsilon) * (offset + gamma) (Zhang and Sennrich, arXiv:1910.07467).

    Attributes:
        offset: 1 in Gemma's norms, else 0.
    """

    gamma: gs.Constant
    offset: float
    epsilon: float
    x: gs.Tensor
    y: gs.Tensor

    def factors(self) -> np.ndarray:
        """What normed values are multiplied by, float32 [features]."""
        return np.float32(self.offset) + weight_of(self.gamma).load().astype(np.float32)


def find_norms(graph: gs.Graph) -> list[Norm]:
    """Every RMSNorm that is spelled out, by its weight `*norm.weight`."""
    gammas = [
        t
        for t in graph.tensors().values()
        if isinstance(t, gs.Constant) and t.name.endswith("norm.weight") and len(t.shape) == 1
    ]
    fused = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization")
    return [_norm(gamma) for gamma in gammas if not any(node.op in fused for node in readers(gamma))]


def find_plain_norms(graph: gs.Graph) -> list[Norm]:
    """Every RMSNorm, for passes that write into its weight: none may multiply by 1 + weight."""
    norms = find_norms(graph)
    odd = next((norm for norm in norms if norm.offset), None)
    need(
        odd is None, f"{odd and odd.gamma.name}: this norm multiplies by 1 + weight, as Gemma's; only plain ones can be folded."
    )
    return norms


def _norm(gamma: gs.Constant) -> Norm:
    name = gamma.name
    scaled, factor, offset = readers(gamma), gamma, 0.0
    if len(scaled) == 1 and scaled[0].op == "Add":
        offsets = [
            v for t in scaled[0].inputs if behind(t) is not gamma and (v := constant_value(t)) is not None and v.size == 1
        ]
        need(len(offsets) == 1, f"{name}: '{scaled[0].name}' does not add one constant to it.")
        offset, factor = float(offsets[0].reshape(-1)[0]), scaled[0].outputs[0]
        scaled = readers(factor)
    need(len(scaled) == 1 and scaled[0].op == "Mul", f"{name}: read by {[n.op for n in scaled]}, expected one Mul.")
    y = scaled[0].outputs[0]
    normed = producer(behind(next(t for t in scaled[0].inputs if behind(t) is not factor)))
    need(normed is not None and normed.op == "Mul", f"{name}: no Mul by the reciprocal root in front of it.")
    assert normed is not None
    roots = [t for t in normed.inputs if (n := producer(behind(t))) is not None and n.op in ("Div", "Reciprocal")]
    need(len(roots) == 1, f"{name}: '{normed.name}' does not multiply by one reciprocal root.")
    x = behind(next(t for t in normed.inputs if t is not roots[0]))
    reciprocal = _made_by(roots[0], name, "Div", "Reciprocal")
    if reciprocal.op == "Div":
        one = constant_value(reciprocal.inputs[0])
        need(one is not None and float(one.reshape(-1)[0]) == 1.0, f"{name}: '{reciprocal.name}' is not 1 / root.")
    shifted = _made_by(_made_by(reciprocal.inputs[-1], name, "Sqrt").inputs[0], name, "Add")
    epsilons = [v for t in shifted.inputs if (v := constant_value(t)) is not None]
    need(len(epsilons) == 1, f"{name}: '{shifted.name}' does not add one constant epsilon.")
    mean = _made_by(next(t for t in shifted.inputs if constant_value(t) is None), name, "ReduceMean")
    axes = mean.attrs["axes"] if "axes" in mean.attrs else constant_value(mean.inputs[1])
    need(list(np.asarray(axes).reshape(-1)) == [-1], f"{name}: '{mean.name}' averages over axes {axes}, expected -1.")
    square = _made_by(mean.inputs[0], name, "Pow")
    exponent = constant_value(square.inputs[1])
    need(exponent is not None and float(exponent.reshape(-1)[0]) == 2.0, f"{name}: '{square.name}' is not a square.")
    need(behind(square.inputs[0]) is x, f"{name}: the mean square is of another tensor than is normed.")
    return Norm(gamma, offset, float(epsilons[0].reshape(-1)[0]), x, y)


def _made_by(tensor: gs.Tensor, where: str, *ops: str) -> gs.Node:
    node = producer(behind(tensor))
    need(node is not None and node.op in ops, f"{where}: expected {' or '.join(ops)}, found {node.op if node else 'an input'}.")
    assert node is not None
    return node


@dataclass(frozen=True, eq=False)
class Rotary:
    """The tables of rotary position embedding: cos and sin of position * inv_freq, both halves alike.

    Attributes:
        inv_freq: float32 [head_dim / 2], as baked into the graph.
        scaling: factor on both tables (YaRN's attention scaling; 1 otherwise).
        cos, sin: the tensors that the layers read.
    """

    inv_freq: np.ndarray
    scaling: float
    cos: gs.Tensor
    sin: gs.Tensor


def find_rotary(graph: gs.Graph) -> Rotary:
    """The one pair of rotary tables of the graph."""
    tables = {op: [n for n in graph.nodes if n.op == op] for op in ("Cos", "Sin")}
    need(all(len(found) == 1 for found in tables.values()), "expected one Cos and one Sin for the rotary tables.")
    (cos,), (sin,) = tables["Cos"], tables["Sin"]
    angle = behind(cos.inputs[0])
    need(behind(sin.inputs[0]) is angle, "cos and sin are taken of different angles.")
    scale_cos, cos_table = _scaled(cos.outputs[0])
    scale_sin, sin_table = _scaled(sin.outputs[0])
    need(scale_cos == scale_sin, "cos and sin are scaled differently.")
    halves = _made_by(angle, "rotary angles", "Concat")
    need(halves.inputs[0] is halves.inputs[1], "rotary angles are not two equal halves (interleaved RoPE?).")
    product = producer(behind(halves.inputs[0], SAME_VALUE | {"Transpose"}))
    need(product is not None and product.op in ("MatMul", "Mul"), "rotary angles are no product of positions.")
    assert product is not None
    constants = [v for t in product.inputs if (v := constant_value(behind(t, VIEWS))) is not None]
    need(len(constants) == 1, "inv_freq is not a constant (dynamic RoPE?).")
    need(any("position_ids" in _leaves(t, []) for t in product.inputs), "rotary angles do not read position_ids.")
    return Rotary(np.asarray(constants[0], np.float32).reshape(-1), scale_cos, cos_table, sin_table)


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
        q_norm, k_norm: RMSNorm of each head of queries and keys before the rotary embedding, where there are any.
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
    q_norm: Norm | None
    k_norm: Norm | None


def find_attention(graph: gs.Graph, linears: dict[str, Linear], rotary: Rotary) -> list[Attention]:
    """The attention of every layer, its whole region proven."""
    fused = next((name for name in linears if name.endswith((".qkv_proj", ".query_key_value", ".Wqkv"))), None)
    need(
        fused is None, f"{fused} makes queries, keys and values in one; a rotary operator reads them from layers of their own."
    )
    layers = [name.removesuffix(".self_attn.q_proj") for name in linears if name.endswith(".self_attn.q_proj")]
    need(layers, "no layer has a quantized self_attn.q_proj: not a decoder that this pass knows.")
    inputs = {t.name: t for t in graph.inputs}
    norms = {norm.gamma.name: norm for norm in find_norms(graph)}
    return [_attention(prefix, linears, rotary, inputs, norms) for prefix in layers]


def _attention(
    prefix: str, linears: dict[str, Linear], rotary: Rotary, inputs: dict[str, gs.Tensor], norms: dict[str, Norm]
) -> Attention:
    layer = int(prefix.rpartition(".")[2])
    where = f"{prefix}.self_attn"
    for part in "qkvo":
        need(f"{where}.{part}_proj" in linears, f"{where}: has no quantized {part}_proj.")
    q, k, v, o = (linears[f"{where}.{part}_proj"] for part in "qkvo")
    past_key = inputs.get(f"past_key_values.{layer}.key")
    need(past_key is not None, f"{where}: the graph has no input past_key_values.{layer}.key.")
    assert past_key is not None
    kv_heads, head_dim = int(past_key.shape[1]), int(past_key.shape[3])
    sizes = [one.weight.source.shape[0] for one in (q, k, v)] + [o.weight.source.shape[1]]
    heads = sizes[0] // head_dim
    need(
        sizes == [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, heads * head_dim] and heads % kv_heads == 0,
        f"{where}: projections of {sizes} features do not fit {kv_heads} key/value heads of {head_dim}.",
    )
    need(
        2 * len(rotary.inv_freq) == head_dim,
        f"{where}: rotary embedding of {2 * len(rotary.inv_freq)} of {head_dim} dimensions (partial) is not supported.",
    )
    own = {f"past_key_values.{layer}.key", f"past_key_values.{layer}.value", "attention_mask"}
    leaves = _leaves(o.x, [q.y, k.y, v.y, rotary.cos, rotary.sin])
    must = {q.y.name, k.y.name, v.y.name, "attention_mask"}
    for name, leaf in leaves.items():
        known = name in own | must | {rotary.cos.name, rotary.sin.name}
        need(known or constant_value(leaf) is not None, f"{where}: reads '{name}', which plain attention does not.")
    need(must <= set(leaves), f"{where}: does not read {sorted(must - set(leaves))}.")
    q_norm, k_norm = (_head_norm(norms.get(f"{where}.{n}_norm.weight"), one, head_dim) for n, one in (("q", q), ("k", k)))
    need((q_norm is None) == (k_norm is None), f"{where}: norms the heads of queries or of keys alone.")
    sources = [one.y if norm is None else norm.y for one, norm in ((q, q_norm), (k, k_norm))]
    scale = _check_scores(where, o, sources[0], sources[1], rotary, inputs[f"past_key_values.{layer}.key"])
    return Attention(layer, q, k, v, o, heads, kv_heads, head_dim, scale, q_norm, k_norm)


def _head_norm(norm: Norm | None, linear: Linear, head_dim: int) -> Norm | None:
    """The norm of a projection's heads, proven to be one; None if there is none."""
    if norm is None:
        return None
    name = norm.gamma.name
    need(tuple(norm.gamma.shape) == (head_dim,), f"{name}: norms {norm.gamma.shape[0]} features, a head has {head_dim}.")
    origin = behind(norm.x, VIEWS)
    need(origin is behind(linear.y), f"{name}: norms '{origin.name}', expected the heads of '{linear.y.name}'.")
    return norm


def _check_scores(where: str, o: Linear, q: gs.Tensor, k: gs.Tensor, rotary: Rotary, past: gs.Tensor) -> float:
    """Prove softmax(rope(q) rope([past, k])^T * scale + mask) and return the scale."""
    weighted = _made_by(behind(o.x, VIEWS), where, "MatMul")
    probabilities = _back(weighted.inputs[0], {"Where"})
    softmax = _made_by(probabilities, where, "Softmax")
    need(softmax.attrs.get("axis", -1) in (-1, 3), f"{where}: '{softmax.name}' normalizes axis {softmax.attrs.get('axis')}.")
    masked = _made_by(softmax.inputs[0], where, "Add")
    products = [n for t in masked.inputs if (n := producer(behind(t))) is not None and n.op == "MatMul"]
    need(len(products) == 1, f"{where}: '{masked.name}' does not add a mask to one product of queries and keys.")
    q_scale, query = _unscaled(products[0].inputs[0])
    k_scale, key = _unscaled(products[0].inputs[1])
    _check_rope(where, query, q, rotary)
    cache = _made_by(behind(key, VIEWS), where, "Concat")
    need(behind(cache.inputs[0]) is past, f"{where}: '{cache.name}' does not append to {past.name}.")
    _check_rope(where, cache.inputs[1], k, rotary)
    return q_scale * k_scale


def _back(tensor: gs.Tensor, ops: set[str]) -> gs.Tensor:
    """Through the guard against fully masked rows: Where(IsNaN(p), 0, p)."""
    node = producer(behind(tensor))
    if node is not None and node.op in ops:
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


def _check_rope(where: str, tensor: gs.Tensor, source: gs.Tensor, rotary: Rotary) -> None:
    """Prove tensor = x * cos + concat(-x[half:], x[:half]) * sin with x the heads of `source`."""
    total = producer(behind(tensor))
    made = "nothing" if total is None else total.op
    need(
        total is not None and total.op == "Add",
        f"{where}: its queries or keys are not rotated (made by {made}, not by an Add).",
    )
    assert total is not None
    terms = [_made_by(t, where, "Mul") for t in total.inputs]
    views = SAME_VALUE | {"Unsqueeze"}

    def operand(node: gs.Node, table: gs.Tensor) -> gs.Tensor | None:
        others = [t for t in node.inputs if behind(t, views) is not behind(table)]
        return others[0] if len(others) == 1 else None

    pairs = [(operand(a, rotary.cos), operand(b, rotary.sin)) for a, b in (terms, terms[::-1])]
    pairs = [(x, turned) for x, turned in pairs if x is not None and turned is not None]
    need(len(pairs) == 1, f"{where}: '{total.name}' is not a rotary embedding with the graph's cos and sin.")
    x, turned = pairs[0]
    assert x is not None
    assert turned is not None
    halves = _made_by(turned, where, "Concat")
    upper = _made_by(_made_by(halves.inputs[0], where, "Neg").inputs[0], where, "Slice")
    lower = _made_by(halves.inputs[1], where, "Slice")
    same = all(behind(part.inputs[0]) is behind(x) for part in (upper, lower))
    need(same, f"{where}: '{halves.name}' does not turn the halves of the same heads.")
    origin = behind(x, VIEWS)
    need(
        origin is behind(source),
        f"{where}: the rotated heads come from '{origin.name}', expected '{source.name}' (a norm between them?).",
    )


def _leaves(tensor: gs.Tensor, stops: list[gs.Tensor]) -> dict[str, gs.Tensor]:
    """What a tensor is computed from: constants, inputs and `stops`; shape arithmetic does not count."""
    ends = {id(one) for stop in stops for one in repeats(stop)}
    found: dict[str, gs.Tensor] = {}
    seen: set[int] = set()
    todo = [tensor]
    while todo:
        one = todo.pop()
        node = producer(one)
        if id(one) in ends or node is None:
            found[behind(one).name] = one
        elif id(node) not in seen:
            seen.add(id(node))
            if node.op not in ("Shape", "ConstantOfShape", "Range"):
                todo += list(node.inputs)
    return found
