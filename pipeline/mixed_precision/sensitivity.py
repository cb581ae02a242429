"""Layers and their choices of bits and block size -> what each choice costs: measured once, remembered by weight and choice."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests, how_quantized

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


LayerChoice = tuple[Layer, BlockFormat]
Sensitivities = dict[tuple[str, BlockFormat], float]
"""Expected loss of each layer, by name, in each form."""


class SensitivityMetric(ABC):
    """What quantizing one weight alone costs.

    Args:
        method: how codes are chosen.
        model: digest of all that sensitivity depends on beside the weight and its form.
    """

    def __init__(self, layers: list[Layer], method: Method, model: str, store: Store) -> None:
        self.layers, self.method, self.model, self.store = layers, method, model, store

    @abstractmethod
    def run(self, choices: list[LayerChoice]) -> Iterator[tuple[Layer, BlockFormat, float]]:
        """The sensitivity of each choice, in any order."""

    def known(self, forms: list[BlockFormat]) -> Sensitivities | None:
        """The sensitivity of every weight in every form, if all of it was measured before."""
        keys = [(layer, form, self._key(layer, form)) for layer in self.layers for form in forms]
        if not all(self.store.has(key) for _, _, key in keys):
            return None
        entries = [(layer.name, form, self.store.get(key)) for layer, form, key in keys]
        return {(name, form): float(entry.facts["sensitivity"]) for name, form, entry in entries if entry is not None}

    def measure(self, forms: list[BlockFormat], progress: Progress) -> Sensitivities:
        """The sensitivity of every weight in every form; what was measured before is recalled.

        Args:
            progress: gets the share of what is missing that is done.
        """
        choices = [(layer, form) for layer in self.layers for form in forms]
        keys = {(layer.name, form): self._key(layer, form) for layer, form in choices}
        entries = {choice: self.store.get(key) for choice, key in keys.items()}
        values = {choice: float(entry.facts["sensitivity"]) for choice, entry in entries.items() if entry is not None}
        missing = [(layer, form) for layer, form in choices if (layer.name, form) not in values]
        for done, (layer, form, value) in enumerate(self.run(missing) if missing else (), 1):
            self.store.put(keys[layer.name, form], lambda _, value=value: {"sensitivity": value})  # type: ignore[misc]
            values[layer.name, form] = value
            progress(done / len(missing))
        return {choice: values[choice] for choice in keys}

    def _key(self, layer: Layer, form: BlockFormat) -> str:
        weight = QuantizedWeight(layer.name, layer.weight, form, self.method)
        return digest(type(self).__name__, self.model, layer.name, *how_quantized(weight), source_digest(type(self)))


class WeightError(SensitivityMetric):
    """Relative squared error of the weight, |W' - W|^2 / |W|^2: no text, one weight in memory at a time."""

    def __init__(self, layers: list[Layer], method: Method, sources: SourceDigests, store: Store) -> None:
        super().__init__(layers, method, "", store)
        self.sources = sources

    def run(self, choices: list[LayerChoice]) -> Iterator[tuple[Layer, BlockFormat, float]]:
        for layer, form in choices:
            chunks = QuantizedWeight(layer.name, layer.weight, form, self.method).chunks()
            error, square = np.sum([(chunk.squared_error, chunk.square) for chunk in chunks], axis=0)
            yield layer, form, float(error / max(square, np.finfo(np.float64).tiny))

    def known(self, forms: list[BlockFormat]) -> Sensitivities | None:
        read = all(self.sources.known(layer.weight) is not None for layer in self.layers)
        return super().known(forms) if read else None

    def _key(self, layer: Layer, form: BlockFormat) -> str:
        return digest(self.sources.of(layer.weight), super()._key(layer, form))
