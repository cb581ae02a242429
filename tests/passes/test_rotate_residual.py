"""Rotations fold into weights: the same logits, every stream outlier gone, and a refusal where the stream is not plain."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from lowbit.passes.base import PassError
from lowbit.passes.quant.hadamard import Rotation, hadamard_factors
from lowbit.passes.quant.rotated_weight import TurnedWeight
from lowbit.passes.quant.scaled_weight import ChannelScale, ScaledWeight
from lowbit.passes.quant.weights import ArrayWeight, CastWeight, SlicedWeight, StackedWeight
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.passes.rotate_residual import RotateResidual
from lowbit.pipeline.runtime.session import decoder_feeds
from tests.conftest import Exported
from tests.graphs import random, run, weights_of

IDS = np.random.default_rng(0).integers(1, 300, (2, 9))


@pytest.mark.parametrize("size", [1, 2, 12, 20, 28, 36, 64, 96, 256, 896, 1536, 3584])
def test_rotations_are_orthogonal_and_flat(size: int) -> None:
    q = Rotation(size, 3).turn(np.eye(size, dtype=np.float32))
    np.testing.assert_allclose(q @ q.T, np.eye(size), rtol=0, atol=2e-5)
    np.testing.assert_allclose(np.abs(q), 1 / np.sqrt(size), rtol=1e-5)
    x = random(3, 2 * size)
    np.testing.assert_allclose(Rotation(size, 3).turn(x)[:, size:], x[:, size:] @ q, rtol=0, atol=1e-4)


def test_orders_without_a_matrix_are_refused() -> None:
    with pytest.raises(PassError, match="no Hadamard matrix of order 70 is known here"):
        hadamard_factors(70)


def logits(graph: gs.Graph) -> np.ndarray:
    names = [t.name for t in graph.outputs]
    return run(graph, **decoder_feeds(graph, IDS))[names.index("logits")]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", {}),
        ("qwen3", {}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "dtype": "float32"}),
    ],
)
@pytest.mark.parametrize("heads", [True, False])
def test_the_logits_stay(exported: Exported, kind: str, options: dict[str, Any], heads: bool) -> None:
    _, graph = exported(kind, **options)
    expected = logits(graph)
    outcome = RotateResidual(heads=heads).apply(graph)
    assert "model.embed_tokens.weight" in outcome.rewritten
    found = logits(graph)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    QuantizeMatmul(bits=4, block_size=16).apply(graph)
    assert len(weights_of(graph)) == 15, "layers keep their names, lm_head among them"
    assert {"lm_head", "model.layers.1.mlp.down_proj"} <= set(weights_of(graph))


def test_outliers_are_spread(exported: Exported) -> None:
    _, graph = exported("qwen2")
    weight = next(t for t in graph.tensors().values() if t.name == "model.layers.0.mlp.up_proj.weight")
    loud = weight._values.load().astype(np.float32)
    loud[:, 5] *= 50
    weight._values = ArrayWeight(loud)
    before = logits(graph)
    RotateResidual().apply(graph)
    np.testing.assert_allclose(logits(graph), before, rtol=0, atol=1e-3 * np.abs(before).max())
    turned = next(t for t in graph.tensors().values() if t.name == "model.layers.0.mlp.up_proj.weight")._values.load()
    peak = lambda w: np.abs(w).max() / np.sqrt((w**2).mean())  # noqa: E731
    assert peak(turned) < 0.4 * peak(loud)


def test_rows_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    w, scale = random(32, 48), random(48, seed=1)
    q, p = (Rotation(size, 0).turn(np.eye(size, dtype=np.float32)) for size in (16, 8))
    turned = TurnedWeight(ArrayWeight(w), ArrayWeight(scale), Rotation(16, 0), Rotation(8, 0))
    expected = np.kron(np.eye(4), p).T @ (w * scale) @ np.kron(np.eye(3), q)
    np.testing.assert_allclose(turned.load(), expected, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(turned.rows(5, 21), turned.load()[5:21])
    monkeypatch.setattr("lowbit.passes.quant.weights.ROW_CHUNK_BYTES", 7 * 48 * 4)
    assert [start for start, _ in turned.chunks()] == [0, 7, 14, 21, 28]
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in turned.chunks()]), turned.load())


class Counted(ArrayWeight):
    """Counts how often each row is read."""

    def __init__(self, array: np.ndarray) -> None:
        super().__init__(array)
        self.counts = np.zeros(len(array), int)

    def rows(self, start: int, stop: int) -> np.ndarray:
        self.counts[start:stop] += 1
        return super().rows(start, stop)


def test_a_walk_mixes_each_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Counted(random(32, 48))
    turned = TurnedWeight(source, turn_out=Rotation(16, 0))
    scale = ChannelScale("a", 48, 2)
    scale.values = np.ones(48, np.float32)
    views = [turned, SlicedWeight(turned, 0, 32), CastWeight(turned, 1), ScaledWeight(turned, read=scale)]
    views += [StackedWeight([("a", turned)])]
    expected = turned.load()
    monkeypatch.setattr("lowbit.passes.quant.weights.ROW_CHUNK_BYTES", 8 * 48 * 4)
    for view in views:
        source.counts[:] = 0
        np.testing.assert_array_equal(np.concatenate([rows for _, rows in view.chunks()]), expected)
        assert source.counts.tolist() == [1] * 32, type(view).__name__


def test_what_else_reads_the_stream_is_named(exported: Exported) -> None:
    _, graph = exported("qwen2")
    norm = next(n for n in graph.nodes if n.name.endswith("layers.1/input_layernorm/Pow"))
    extra = gs.Variable("extra", np.float32)
    graph.nodes.append(gs.Node("Tanh", "spy", {}, [norm.inputs[0]], [extra]))
    graph.outputs.append(extra)
    with pytest.raises(PassError, match=r"'spy' \(Tanh\) reads the residual stream"):
        RotateResidual().apply(graph)
    with pytest.raises(PassError, match="no RMSNorm found"):
        RotateResidual().apply(gs.Graph())
