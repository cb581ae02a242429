"""Attention as exported (past, mask and shape arithmetic) -> one RoPE and one Attention node a layer."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.passes.base import Outcome, Pass
from lowbit.passes.graph.attention import Attention, Rotary, find_attention, find_rotaries
from lowbit.passes.graph.build import add_node, integers, scalar
from lowbit.passes.graph.decoder import find_linears, need, refuse_float_layers
from lowbit.passes.graph.lowered_ops import ATTENTION, NORMED_ROPE, ROPE, declare
from lowbit.passes.graph.quantized_ops import DOMAIN


class LowerAttention(Pass):
    """Replace each layer's attention, its whole region proven, by fused nodes that keep their own cache.

    The graph loses its `past_key_values` and becomes that of one sequence: inputs `input_ids`,
    `attention_mask` float32 [1, 1, tokens, tokens] (added to the scores), `position_ids` int32 [1, tokens];
    the rotary tables are computed once from the graph's own inv_freq. Norms of the heads of queries and keys become part
    of the rotary node. Refused: partial or interleaved rotary embedding, and whatever else plain attention does not read.
    """

    def apply(self, graph: gs.Graph) -> Outcome:
        rotaries = find_rotaries(graph)
        refuse_float_layers(graph)
        layers = find_attention(graph, find_linears(graph), rotaries)
        for layer in layers:
            _check(layer, rotaries)
        for tensor in graph.inputs:
            if tensor.name in ("attention_mask", "position_ids"):
                tensor.name += ".exported"
        mask = gs.Variable("attention_mask", np.float32, [1, 1, "tokens", "tokens"])
        positions = gs.Variable("position_ids", np.int32, [1, "tokens"])
        cos, sin = _tables(graph, rotaries[0], positions, layers[0].head_dim)
        declare(graph, ROPE, NORMED_ROPE, ATTENTION)
        still = _still(graph, cos, sin) if any(layer.rotary is None for layer in layers) else (cos, sin)
        for layer in layers:
            _rewrite(graph, layer, *(still if layer.rotary is None else (cos, sin)), mask)
        graph.inputs = [t for t in graph.inputs if t.name == "input_ids"] + [mask, positions]
        graph.outputs = [t for t in graph.outputs if t.name == "logits"]
        graph.cleanup().toposort()
        return Outcome(tuple(f"model.layers.{layer.layer}.self_attn" for layer in layers))


def _check(layer: Attention, rotaries: list[Rotary]) -> None:
    """Refuse what the fused nodes cannot say."""
    where = f"model.layers.{layer.layer}.self_attn"
    need(len(rotaries) == 1, f"the graph has {len(rotaries)} pairs of rotary tables, the fused nodes know one.")
    rotated = 2 * len(rotaries[0].inv_freq)
    need(
        rotated == layer.head_dim,
        f"{where}: rotary embedding of {rotated} of {layer.head_dim} dimensions (partial) is not supported.",
    )
    need(not layer.softcap, f"{where}: caps its scores at {layer.softcap:g}, which the fused node does not.")


def _tables(graph: gs.Graph, rotary: Rotary, positions: gs.Tensor, head_dim: int) -> tuple[gs.Tensor, gs.Tensor]:
    """Make cos and sin, each float32 [1, tokens, 1, head_dim]."""
    ids = add_node(graph, "Cast", "rotary.float_ids", [positions], to=TensorProto.FLOAT)
    position = add_node(graph, "Reshape", "rotary.position", [ids, integers("rotary.column_shape", -1, 1)])
    angle = add_node(graph, "Mul", "rotary.angle", [position, gs.Constant("rotary.inv_freq", rotary.inv_freq[None])])
    both = add_node(graph, "Concat", "rotary.angles", [angle, angle], axis=-1)
    tables = []
    for name, op in (("cos", "Cos"), ("sin", "Sin")):
        table = add_node(graph, op, f"rotary.{name}_of_angles", [both])
        if rotary.scaling != 1.0:
            factor = scalar(f"rotary.{name}_factor", rotary.scaling)
            table = add_node(graph, "Mul", f"rotary.{name}_scaled", [table, factor])
        shape = integers(f"rotary.{name}_shape", 1, -1, 1, head_dim)
        tables.append(add_node(graph, "Reshape", f"rotary.{name}", [table, shape]))
    return tables[0], tables[1]


def _still(graph: gs.Graph, cos: gs.Tensor, sin: gs.Tensor) -> tuple[gs.Tensor, gs.Tensor]:
    """Tables that rotate nothing, of the shape of `cos` and `sin`: ones and zeros."""
    zero = scalar("rotary.zero", 0.0)
    zeros = add_node(graph, "Mul", "rotary.still_cos_zero", [cos, zero])
    ones = add_node(graph, "Add", "rotary.still_cos", [zeros, scalar("rotary.one", 1.0)])
    return ones, add_node(graph, "Mul", "rotary.still_sin", [sin, zero])


def _rewrite(graph: gs.Graph, layer: Attention, cos: gs.Tensor, sin: gs.Tensor, mask: gs.Tensor) -> None:
    prefix = f"model.layers.{layer.layer}.self_attn"
    heads, kv, dim = layer.heads, layer.kv_heads, layer.head_dim
    q, k, v, y = (gs.Variable(f"{prefix}.{part}", np.float32) for part in ("q", "k", "v", "y"))
    rope: dict[str, object] = {"q_shape": [1, -1, heads, dim], "k_shape": [1, -1, kv, dim]}
    kind, sources = "RoPE", [layer.q.y, layer.k.y]
    if layer.q_norm is not None and layer.k_norm is not None and layer.q_norm.gamma.shape[0] != dim:
        sources = [layer.q_norm.y, layer.k_norm.y]  # norms of all features stay in front
    elif layer.q_norm is not None and layer.k_norm is not None:
        kind, epsilon = "NormedRoPE", layer.q_norm.epsilon
        need(layer.k_norm.epsilon == epsilon, f"{prefix}: norms of queries and keys differ in epsilon.")
        gammas = {"q_gamma": layer.q_norm, "k_gamma": layer.k_norm}
        rope |= {name: norm.factors().tolist() for name, norm in gammas.items()}
        rope["epsilon"] = float(epsilon)
    inputs = [*sources, cos, sin]
    graph.nodes.append(gs.Node(kind, f"{prefix}.rope", rope, inputs, [q, k], domain=DOMAIN))
    shape = integers(f"{prefix}.v_shape", 1, -1, kv, dim)
    graph.nodes.append(gs.Node("Reshape", f"{prefix}.v_heads", {}, [layer.v.y, shape], [v]))
    attrs = {
        "layer": layer.layer, "scale": layer.scale, "group_shape": [1, kv, heads // kv, 1, 1],
        "k_shape": [1, heads, dim, -1], "v_shape": [1, heads, -1, dim], "out_shape": [1, -1, heads * dim],
    }  # fmt: skip
    graph.nodes.append(gs.Node("Attention", prefix, attrs, [q, k, v, mask], [y], domain=DOMAIN))
    layer.o.node.inputs[0] = y
