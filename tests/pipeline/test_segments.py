"""Block by block is the same as at once, to the last bit."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from passes.narrow_embedding import NarrowEmbedding
from passes.quantize_matmul import QuantizeMatmul
from pipeline.segments import Segments
from pipeline.sessions import decoder_feeds, open_reference, weight_folder
from tests.conftest import Exported
from tests.graphs import run


@pytest.mark.parametrize(("kind", "options"), [("qwen2", {}), ("qwen3", {}), ("llama", {"tie_word_embeddings": True})])
def test_logits_equal_those_of_the_whole_graph(exported: Exported, kind: str, options: dict[str, bool]) -> None:
    _, graph = exported(kind, **options)
    session = open_reference(graph)
    batches = [np.random.default_rng(i).integers(1, 300, (2, 12)) for i in range(3)]
    feeds = [decoder_feeds(graph, ids) for ids in batches]
    segments = Segments(graph, weight_folder(graph), "logits")
    assert len(segments.pieces) == 4, "what is before, two layers, what is after"
    shares: list[float] = []
    for one, found in zip(feeds, segments.run(feeds, shares.append), strict=True):
        np.testing.assert_array_equal(found, session.run(["logits"], one)[0])
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1.0)


def test_no_segment_holds_the_weights_of_two_layers(exported: Exported) -> None:
    _, graph = exported("qwen2")
    for piece in Segments(graph, weight_folder(graph), "logits").pieces:
        names = {
            t.name for node in piece for t in node.inputs if isinstance(t, gs.Constant) and t.name.startswith("model.layers")
        }
        assert len({name.split(".")[2] for name in names}) <= 1


def test_an_inner_tensor_can_be_asked_for(exported: Exported) -> None:
    _, graph = exported("qwen2")
    head = next(t for t in graph.outputs if t.name == "logits").inputs[0]
    feeds = decoder_feeds(graph, np.ones((1, 5), np.int64))
    hidden = next(Segments(graph, weight_folder(graph), head.inputs[0].name).run([feeds], lambda done: None))
    assert hidden.shape == (1, 5, 64)


def test_model_local_functions_travel_with_their_segment(exported: Exported) -> None:
    _, graph = exported("qwen2")
    NarrowEmbedding().apply(graph)
    QuantizeMatmul(bits=3, block_size=32).apply(graph)
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and hasattr(tensor._values, "load"):
            tensor._values = tensor._values.load()
    feeds = decoder_feeds(graph, np.ones((1, 5), np.int64))
    found = next(Segments(graph, weight_folder(exported("qwen2")[1]), "logits").run([feeds], lambda done: None))
    names = [t.name for t in graph.outputs]
    np.testing.assert_array_equal(found, run(graph, **feeds)[names.index("logits")])
