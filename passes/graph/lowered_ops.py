"""Fused operators of an on-device runtime, with bodies in standard ONNX.

The bodies make a lowered graph run in onnxruntime too, so that it can be compared with the graph it came
from before another engine sees it.
"""

from __future__ import annotations

import onnx.parser
import onnx_graphsurgeon as gs

from lowbit.passes.graph.quantized_ops import DOMAIN

_HEADER = f"""
<ir_version: 10, opset_import: ["": 18, "{DOMAIN}": 1]>
holder (float[1] x) => (float[1] y) {{ y = Identity (x) }}
"""


def _normed(x: str) -> str:
    return f"""
    {x}_square = Mul ({x}_plain, {x}_plain)
    {x}_mean = ReduceMean <keepdims = 1> ({x}_square, last_axis)
    {x}_shifted = Add ({x}_mean, {x}_epsilon)
    {x}_root = Sqrt ({x}_shifted)
    {x}_unit = Div ({x}_plain, {x}_root)
    {x}_gamma_values = Constant <value_floats: floats = @{x}_gamma> ()
    {x}_heads = Mul ({x}_unit, {x}_gamma_values)
"""


def _rotated(x: str, normed: bool = False) -> str:
    plain = "plain" if normed else "heads"
    return f"""
    {x}_size = Constant <value_ints: ints = @{x}_shape> ()
    {x}_{plain} = Reshape ({x}, {x}_size)
    {_normed(x) if normed else ""}
    {x}_low, {x}_high = Split <axis = -1, num_outputs = 2> ({x}_heads)
    {x}_minus = Neg ({x}_high)
    {x}_turned = Concat <axis = -1> ({x}_minus, {x}_low)
    {x}_cos = Mul ({x}_heads, cos)
    {x}_sin = Mul ({x}_turned, sin)
    {x}_out = Add ({x}_cos, {x}_sin)
"""


ROPE = f"""
<domain: "{DOMAIN}", opset_import: ["": 18]>
RoPE <q_shape, k_shape> (q, k, cos, sin) => (q_out, k_out) {{ {_rotated("q")} {_rotated("k")} }}
"""
"""Rotary position embedding (Su et al., arXiv:2104.09864), halves turned against each other.

q float32 [1, tokens, heads * head_dim], k likewise; cos, sin [1, tokens, 1, head_dim]; q_shape, k_shape the
outputs' [1, -1, heads, head_dim].
"""

NORMED_ROPE = f"""
<domain: "{DOMAIN}", opset_import: ["": 18]>
NormedRoPE <q_shape, k_shape, q_gamma, k_gamma, epsilon> (q, k, cos, sin) => (q_out, k_out)
{{
    last_axis = Constant <value = int64[1] {{-1}}> ()
    q_epsilon = Constant <value_float: float = @epsilon> ()
    k_epsilon = Identity (q_epsilon)
    {_rotated("q", normed=True)} {_rotated("k", normed=True)}
}}
"""
"""`ROPE` of heads that RMSNorm was applied to first, as in Qwen3: q_gamma, k_gamma float32 [head_dim]."""

ROPES = ("RoPE", "NormedRoPE")
"""The rotary operators, one of which each layer has."""


def _grouped(x: str, perm: str) -> str:
    return f"""
    {x}_first = Transpose <perm = {perm}> ({x})
    {x}_group = Unsqueeze ({x}_first, group_axis)
    {x}_repeated = Expand ({x}_group, groups)
    {x}_size = Constant <value_ints: ints = @{x}_shape> ()
    {x}_heads = Reshape ({x}_repeated, {x}_size)
"""


ATTENTION = f"""
<domain: "{DOMAIN}", opset_import: ["": 18]>
Attention <layer, scale, group_shape, k_shape, v_shape, out_shape> (q, k, v, mask) => (y)
{{
    group_axis = Constant <value = int64[1] {{2}}> ()
    groups = Constant <value_ints: ints = @group_shape> ()
    {_grouped("k", "[0, 2, 3, 1]")}
    {_grouped("v", "[0, 2, 1, 3]")}
    q_first = Transpose <perm = [0, 2, 1, 3]> (q)
    products = MatMul (q_first, k_heads)
    factor = Constant <value_float: float = @scale> ()
    scores = Mul (products, factor)
    masked = Add (scores, mask)
    weights = Softmax <axis = -1> (masked)
    heads = MatMul (weights, v_heads)
    tokens_first = Transpose <perm = [0, 2, 1, 3]> (heads)
    out_size = Constant <value_ints: ints = @out_shape> ()
    y = Reshape (tokens_first, out_size)
}}
"""
"""Grouped-query attention over the tokens at hand (Ainslie et al., arXiv:2305.13245).

q float32 [1, tokens, heads, head_dim]; k, v [1, tokens, kv_heads, head_dim]; mask is added to the scores.
In a runtime the operator owns its key/value cache; this body has none.
"""


def declare(graph: gs.Graph, *functions: str) -> None:
    """Add model-local functions to a graph."""
    for text in functions:
        graph.functions.extend(gs.import_onnx(onnx.parser.parse_model(_HEADER + text)).functions)
