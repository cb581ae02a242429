"""Block by block is the same as at once, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from lowbit.pipeline.runtime.layerwise import LayerwiseModel
from lowbit.pipeline.runtime.session import decoder_feeds, load_model, open_model, open_reference, weight_folder
from tests.conftest import Exported


@pytest.mark.parametrize(("kind", "options"), [("qwen2", {}), ("qwen3", {}), ("llama", {"tie_word_embeddings": True})])
def test_logits_equal_those_of_the_whole_graph(exported: Exported, kind: str, options: dict[str, bool]) -> None:
    _, graph = exported(kind, **options)
    session = open_reference(graph)
    batches = [np.random.default_rng(i).integers(1, 300, (2, 12)) for i in range(3)]
    feeds = [decoder_feeds(graph, ids) for ids in batches]
    model = LayerwiseModel(graph, weight_folder(graph), "logits")
    assert len(model.subgraphs) == 4, "what is before, two layers, what is after"
    shares: list[float] = []
    for one, found in zip(feeds, model.run(feeds, shares.append), strict=True):
        np.testing.assert_array_equal(found, session.run(["logits"], one)[0])
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_no_subgraph_holds_the_weights_of_two_layers(exported: Exported) -> None:
    _, graph = exported("qwen2")
    for subgraph in LayerwiseModel(graph, weight_folder(graph), "logits").subgraphs:
        names = {
            t.name for node in subgraph for t in node.inputs if isinstance(t, gs.Constant) and t.name.startswith("model.layers")
        }
        assert len({name.split(".")[2] for name in names}) <= 1


def test_an_inner_tensor_can_be_asked_for(exported: Exported) -> None:
    _, graph = exported("qwen2")
    head = next(t for t in graph.outputs if t.name == "logits").inputs[0]
    feeds = decoder_feeds(graph, np.ones((1, 5), np.int64))
    hidden = next(LayerwiseModel(graph, weight_folder(graph), head.inputs[0].name).run([feeds], lambda done: None))
    assert hidden.shape == (1, 5, 64)


def test_three_bits_expanded_here_give_the_bits_of_onnxruntimes_own_unpacking(results: Callable[..., Path]) -> None:
    file = results("narrow_embedding", "quantize_matmul: {bits: 3, block_size: 32}") / "onnx" / "model.onnx"
    graph = gs.import_onnx(load_model(file))
    assert {node.op for node in graph.nodes if node.domain} == {"MatMul3Bits"}
    feeds = decoder_feeds(graph, np.arange(1, 7)[None])
    found = next(LayerwiseModel(graph, file.parent, "logits").run([feeds], lambda done: None))
    np.testing.assert_array_equal(found, open_model(file).run(["logits"], feeds)[0])
    assert {node.op for node in graph.nodes if node.domain} == {"MatMul3Bits"}, "the graph itself is not changed"
