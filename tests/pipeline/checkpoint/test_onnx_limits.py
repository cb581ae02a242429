"""Graphs that would take all memory or never end are refused by what they say, before anything is computed."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from lowbit.pipeline.checkpoint.onnx_limits import objection
from lowbit.pipeline.limits import MOST_BODIES, MOST_NODES

MANY = "Constant <value = int64[2] {100000, 100000}> ()"
LOOP = "y = Loop <body = b (int64 i, bool c, float v) => (bool d, float w) { d = Identity (c) w = Identity (v) }>"
SMALL = [
    "k = Constant <value = int64[2] {8, 8}> () y = ConstantOfShape (k)",
    "k = Constant <value = int64[1] {8}> () y = Expand (x, k)",
    "k = Shape (x) y = Expand (x, k)",
    "a = Constant <value = float {0}> () b = Constant <value = float {8}> () c = Constant <value = float {1}> () "
    "y = Range (a, b, c)",
    f"m = Constant <value = int64 {{10}}> () t = Constant <value = bool {{1}}> () {LOOP} (m, t, x)",
]


def graph(text: str) -> onnx.GraphProto:
    return onnx.parser.parse_graph(f"g (float[1] x) => (float y) {{ {text} }}")


@pytest.mark.parametrize("text", SMALL)
def test_what_honest_graphs_do(text: str) -> None:
    assert objection(graph(text)) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"k = {MANY} y = ConstantOfShape (k)", "makes 10000000000 elements of constants in ConstantOfShape 'y'"),
        (f"k = {MANY} y = Expand (x, k)", "in Expand 'y'"),
        (f"k = {MANY} y = Tile (x, k)", "in Tile 'y'"),
        (
            "a = Constant <value = float {0}> () b = Constant <value = float {1e12}> () c = Constant <value = float {1}> () "
            "y = Range (a, b, c)",
            "in Range 'y'",
        ),
        (f"m = Constant <value = int64 {{1000000000}}> () t = Constant <value = bool {{1}}> () {LOOP} (m, t, x)", "no end"),
        (f"m = Size (x) t = Constant <value = bool {{1}}> () {LOOP} (m, t, x)", "rounds is no constant up to 65,536"),
    ],
)
def test_what_they_do_not(text: str, why: str) -> None:
    assert why in str(objection(graph(text)))


def test_depth_and_number() -> None:
    body = graph("y = Identity (x)")
    for _ in range(MOST_BODIES + 1):
        node = onnx.helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
        body = onnx.helper.make_graph([node], "g", [], [])
        if _ < MOST_BODIES // 2:
            assert objection(body) is None
    assert "more than 8 deep" in str(objection(body))
    many = graph("y = Identity (x)")
    node = many.node[0]
    many.node.extend([node] * MOST_NODES)
    assert f"has 200,001 nodes, at most {MOST_NODES:,} are read" == objection(many)
    wide = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1] * 100, np.zeros(1, np.float32))
    assert "'w' has [1, 1" in str(objection(onnx.helper.make_graph([], "g", [], [], [wide])))
