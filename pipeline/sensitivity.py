"""How much each weight costs at each choice of bits and block size: measured once, remembered by weight and choice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes._blocks import BlockFormat
from passes._quantized import QuantizedWeight
from passes._weights import Weight
from passes.methods.base import Method
from pipeline.scores import score_tokens
from pipeline.sessions import decoder_feeds, open_reference
from pipeline.store import Store, digest, source_digest, versions
from pipeline.weights import SourceDigests, how_quantized

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Layer:
    """A MatMul whose weight is to get bits.

    Attributes:
        node: of the float graph.
        weight: its [N, K] view.
    """

    name: str
    node: gs.Node
    weight: Weight


def weight_errors(
    layers: list[Layer], forms: list[BlockFormat], method: Method, sources: SourceDigests, store: Store, progress: Progress
) -> dict[tuple[str, BlockFormat], float]:
    """Relative squared error of every weight in every form, |W' - W|^2 / |W|^2; one weight in memory at a time."""
    found = {}
    for done, layer in enumerate(layers):
        for form in forms:
            weight = QuantizedWeight(layer.name, layer.weight, form, method)
            key = digest("weight error", sources.of(layer.weight), *how_quantized(weight), source_digest(__name__))
            entry = store.get(key) or store.put(key, partial(_facts, _relative_error, weight))
            found[layer.name, form] = float(entry.facts["damage"])
        progress((done + 1) / len(layers))
    return found


def _facts(measure: Callable[[Any], float], of: Any, folder: Path) -> dict[str, Any]:
    """What an entry of the store holds; its folder stays empty."""
    return {"damage": measure(of)}


def _relative_error(weight: QuantizedWeight) -> float:
    square = sum(float(np.square(rows.astype(np.float64)).sum()) for _, rows in weight.source.chunks())
    return sum(chunk.squared_error for chunk in weight.chunks()) / max(square, np.finfo(np.float64).tiny)


class OutputDivergence:
    """KL divergence of a float decoder's output when one of its weights is replaced.

    Args:
        graph: float; it is changed: the weights of `layers` become inputs, so that one session serves all.
        windows: token ids int64 [windows, tokens] to compare on.
        model: digest of the model and of the passes that were applied to it.
    """

    def __init__(self, graph: gs.Graph, layers: list[Layer], windows: np.ndarray, model: str, store: Store) -> None:
        self.layers, self.windows, self.store = layers, windows, store
        self.model = digest(model, windows.tolist(), source_digest(__name__), versions(("onnxruntime",)))
        self.graph = graph

    def measure(self, forms: list[BlockFormat], method: Method, progress: Progress) -> dict[tuple[str, BlockFormat], float]:
        """The divergence, in nats per token, of every weight in every form."""
        todo = [(layer, form) for layer in self.layers for form in forms]
        found: dict[tuple[str, BlockFormat], float] = {}
        keys = {(layer.name, form): self._key(layer, form, method) for layer, form in todo}
        missing = [one for one in todo if self.store.get(keys[one[0].name, one[1]]) is None]
        for done, (layer, form, damage) in enumerate(self._run(missing, method)):
            self.store.put(keys[layer.name, form], partial(_facts, float, damage))
            progress((done + 1) / len(missing))
        for place, key in keys.items():
            entry = self.store.get(key)
            assert entry is not None
            found[place] = float(entry.facts["damage"])
        return found

    def _key(self, layer: Layer, form: BlockFormat, method: Method) -> str:
        weight = QuantizedWeight(layer.name, layer.weight, form, method)
        return digest("output divergence", self.model, layer.name, *how_quantized(weight))

    def _run(self, todo: list[tuple[Layer, BlockFormat]], method: Method) -> Iterator[tuple[Layer, BlockFormat, float]]:
        if not todo:
            return
        weights: dict[str, np.ndarray] = {}
        for layer in self.layers:
            n, k = layer.weight.shape
            place = gs.Variable(f"{layer.name}.probe", np.float32, [k, n])
            layer.node.inputs[1] = place
            self.graph.inputs.append(place)
            weights[place.name] = np.ascontiguousarray(layer.weight.load().astype(np.float32).T)
        self.graph.cleanup().toposort()
        session = open_reference(self.graph)
        feeds = weights | decoder_feeds(session, self.windows)
        expected = session.run(["logits"], feeds)[0]
        for layer, form in todo:
            rows = layer.weight.load()
            changed = method.quantize(rows, form).dequantize(rows.shape[1]).astype(np.float32)
            name = f"{layer.name}.probe"
            logits = session.run(["logits"], feeds | {name: np.ascontiguousarray(changed.T)})[0]
            yield layer, form, self._divergence(expected, logits)

    def _divergence(self, expected: np.ndarray, logits: np.ndarray) -> float:
        flat = [np.ascontiguousarray(one[:, :-1]).reshape(-1, one.shape[-1]) for one in (expected, logits)]
        return float(score_tokens(*flat, self.windows[:, 1:].reshape(-1))[:, 2].mean())
