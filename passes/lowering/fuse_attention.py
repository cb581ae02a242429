"""Attention spelled out (past, mask, rotary embedding) -> one GroupQueryAttention a layer."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.passes.base import Outcome, Pass
from lowbit.passes.graph.attention import Attention, Rotary, find_attention, find_rotaries
from lowbit.passes.graph.build import add_node, integers
from lowbit.passes.graph.decoder import Norm, find_linears
from lowbit.passes.graph.quantized_ops import MICROSOFT
from lowbit.passes.lowering.fuse_norm import add_norm


class FuseAttention(Pass):
    """Replace each layer's attention, its whole region proven, by onnxruntime's operator of grouped queries.

    GroupQueryAttention (com.microsoft operator documentation; Ainslie et al., arXiv:2305.13245) rotates queries and keys,
    by tables of cos and sin for every position up to `max_length`, appends to past keys and values in place where the caller
    shares their buffers, and counts positions from `attention_mask` int64 [batch, total], padded on the right: the input
    `position_ids` goes.
    """

    max_length: int
    """Positions that the model can have."""
    windows: tuple[int, ...] = ()
    """How many tokens each layer attends to, -1 for all of them; empty where every layer attends to all."""

    def apply(self, graph: gs.Graph) -> Outcome:
        rotaries = find_rotaries(graph)
        layers = find_attention(graph, find_linears(graph), rotaries)
        tables = {id(rotary): _tables(rotary, i, self.max_length) for i, rotary in enumerate(rotaries)}
        lengths = _lengths(graph)
        for layer in layers:
            window = self.windows[layer.layer] if self.windows else -1
            _rewrite(graph, layer, window, [*lengths, *([] if layer.rotary is None else tables[id(layer.rotary)])])
        graph.inputs = [t for t in graph.inputs if t.name != "position_ids"]
        graph.cleanup().toposort()
        return Outcome(tuple(f"model.layers.{layer.layer}.self_attn" for layer in layers))


def _tables(rotary: Rotary, number: int, length: int) -> list[gs.Constant]:
    """Make cos and sin, each float32 [length, rotated dimensions / 2], computed as float64."""
    angles = np.arange(length, dtype=np.float64)[:, None] * rotary.inv_freq.astype(np.float64)
    return [
        gs.Constant(f"rotary.{number}.{name}", (function(angles) * rotary.scaling).astype(np.float32))
        for name, function in (("cos", np.cos), ("sin", np.sin))
    ]


def _lengths(graph: gs.Graph) -> list[gs.Tensor]:
    """Index of the last token of each row, int32 [batch]; how many tokens the longest has, int32 scalar."""
    mask, name = next(t for t in graph.inputs if t.name == "attention_mask"), "attention_mask"
    one, index = gs.Constant(f"{name}.one", np.array(1, np.int32)), gs.Constant(f"{name}.index", np.array(1))
    tokens = add_node(graph, "ReduceSum", f"{name}.tokens", [mask, integers(f"{name}.axis", 1)], None, keepdims=0)
    tokens = add_node(graph, "Cast", f"{name}.tokens_int32", [tokens], None, to=TensorProto.INT32)
    shape = add_node(graph, "Shape", f"{name}.shape", [mask], None)
    total = add_node(graph, "Gather", f"{name}.total", [shape, index], None, axis=0)
    last = add_node(graph, "Sub", f"{name}.last", [tokens, one], None)
    return [last, add_node(graph, "Cast", f"{name}.total_int32", [total], None, to=TensorProto.INT32)]


def _rewrite(graph: gs.Graph, layer: Attention, window: int, shared: list[gs.Tensor]) -> None:
    prefix = f"model.layers.{layer.layer}.self_attn"
    tensors = graph.tensors()
    past = [tensors[f"past_key_values.{layer.layer}.{part}"] for part in ("key", "value")]
    present = [tensors[f"present.{layer.layer}.{part}"] for part in ("key", "value")]
    for output in present:
        output.inputs.clear()
    q = _normed(graph, layer.q.y, layer.q_norm, layer.heads, layer.head_dim)
    k = _normed(graph, layer.k.y, layer.k_norm, layer.kv_heads, layer.head_dim)
    y = gs.Variable(f"{prefix}.y", np.float32)
    attrs = {
        "num_heads": layer.heads, "kv_num_heads": layer.kv_heads, "scale": layer.scale, "softcap": layer.softcap,
        "do_rotary": int(layer.rotary is not None), "rotary_interleaved": 0, "local_window_size": window,
    }  # fmt: skip
    inputs = [q, k, layer.v.y, *past, *shared]
    graph.nodes.append(gs.Node("GroupQueryAttention", prefix, attrs, inputs, [y, *present], domain=MICROSOFT))
    layer.o.node.inputs[0] = y


def _normed(graph: gs.Graph, x: gs.Tensor, norm: Norm | None, heads: int, head_dim: int) -> gs.Tensor:
    """Norm x [batch, tokens, heads * head_dim], each head or all of it, where the layer does so."""
    if norm is None:
        return x
    if norm.gamma.shape[0] != head_dim:
        return norm.y
    name, size = norm.gamma.name.removesuffix(".weight"), norm.gamma.shape[0]
    by_head = add_node(graph, "Reshape", f"{name}.heads", [x, integers(f"{name}.heads_shape", 0, 0, heads, size)])
    unit = gs.Variable(f"{name}.y", np.float32)
    add_norm(graph, norm, by_head, unit)
    return add_node(graph, "Reshape", f"{name}.features", [unit, integers(f"{name}.features_shape", 0, 0, -1)])
