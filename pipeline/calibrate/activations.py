"""A partitioned graph and text -> what flows through the float model and the one quantized so far, hidden states in between."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lowbit.passes.quant.hessian import Hessian, Moments
from lowbit.passes.quant.parallel import in_order
from lowbit.pipeline.calibrate.subgraphs import PartitionedGraph, Product
from lowbit.pipeline.onnx_io.stored_layer import StoredLayer, stored_as_entry
from lowbit.pipeline.runtime.memory import return_memory
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import decoder_feeds
from lowbit.pipeline.store.scratch import LARGE, scratch_array
from lowbit.pipeline.store.store import Entry

BATCH_TOKENS = 4096
"""Tokens that go through onnxruntime at once."""
Floats = npt.NDArray[np.float32]
T = TypeVar("T")


@dataclass
class PairedActivations:
    """The tensors of both models at the same place in the graph.

    Attributes:
        scratch: a folder for what is too large for memory.
        exact, quantized: for each batch of windows, the tensors that later subgraphs read, by name.
    """

    partitioned: PartitionedGraph
    scratch: Path
    exact: list[Feeds]
    quantized: list[Feeds] = field(default_factory=list)

    @staticmethod
    def begin(partitioned: PartitionedGraph, scratch: Path, windows: npt.NDArray[np.int64]) -> PairedActivations:
        """Before the first subgraph of windows int64 [windows, tokens], some of them at a time."""
        size = max(1, BATCH_TOKENS // windows.shape[1])
        batches = [windows[start : start + size] for start in range(0, len(windows), size)]
        return PairedActivations(partitioned, scratch, [decoder_feeds(partitioned.graph, ids) for ids in batches])

    def run(self, number: int) -> None:
        """Run what leads to the products of a subgraph."""
        self._run(number, self.exact + self.quantized)
        if not self.quantized:  # nothing was quantized before the first products
            self.quantized = [dict(state) for state in self.exact]

    def run_exact(self, number: int) -> None:
        """`run` of the float model alone."""
        self._run(number, self.exact)

    def _run(self, number: int, states: list[Feeds]) -> None:
        for state in self.partitioned.run(number, states):
            for name, value in state.items():
                if value.nbytes >= LARGE and not isinstance(value, np.memmap):
                    state[name] = scratch_array(self.scratch, value.shape, value.dtype)
                    state[name][...] = value

    def moments(self, x: str) -> Hessian:
        """Second moments of an input of the quantized model's products."""
        sums = Moments(self.quantized[0][x].shape[-1])
        for state in self.quantized:
            sums.add(_rows(state[x]))
        return sums.hessian()

    def drift(self, x: str) -> list[tuple[Floats, Floats]]:
        """For each batch how far an input is from the float model's, and the input; float32 [tokens, K] both."""
        pairs = []
        for exact, quantized in zip(self.exact, self.quantized, strict=True):
            away = scratch_array(self.scratch, exact[x].shape)
            np.subtract(exact[x], quantized[x], out=away)
            pairs.append((_rows(away), _rows(quantized[x])))
        return pairs

    def sample(self, x: str, tokens: int) -> Floats:
        """An input of the float model at about so many places, evenly spread over the text, float32 [places, K]."""
        inputs = [_rows(state[x]) for state in self.exact]
        step = -(-sum(map(len, inputs)) // tokens)
        starts = np.cumsum([0, *map(len, inputs)])
        return np.concatenate([rows[-start % step :: step] for start, rows in zip(starts, inputs, strict=False)])

    def multiply_exact(self, product: Product) -> None:
        """Compute the float model's y of a product."""
        weight = product.weight.source
        outputs = [self._output(state, product, weight.shape[0]) for state in self.exact]
        _run_all(partial(self._multiply_rows_exact, product.x, outputs), weight.chunks())

    def _multiply_rows_exact(self, x: str, outputs: list[Floats], chunk: tuple[int, npt.NDArray]) -> None:
        start, rows = chunk
        values = rows.astype(np.float32).T
        for state, y in zip(self.exact, outputs, strict=True):
            y[:, start : start + values.shape[1]] = _rows(state[x]) @ values

    def multiply_quantized(self, product: Product, entry: Entry) -> None:
        """Compute the quantized model's y, by the codes of an entry."""
        layer = stored_as_entry(product.weight, entry.folder)
        outputs = [self._output(state, product, layer.n) for state in self.quantized]
        _run_all(partial(self._multiply_rows_quantized, product.x, outputs, layer), layer.row_ranges())

    def _multiply_rows_quantized(self, x: str, outputs: list[Floats], layer: StoredLayer, rows: tuple[int, int]) -> None:
        start, stop = rows
        values = layer.block_rows(start, stop).dequantize(layer.k).T
        for state, y in zip(self.quantized, outputs, strict=True):
            y[:, start:stop] = _rows(state[x]) @ values

    def release(self, number: int) -> None:
        """Let go of what only the products of a subgraph read."""
        later = self.partitioned.read_after(number)
        for state in self.exact + self.quantized:
            for name in state.keys() - later:
                del state[name]
        return_memory()

    def _output(self, state: Feeds, product: Product, n: int) -> Floats:
        """Make an array for y in a state; as [tokens, n]."""
        state[product.y] = scratch_array(self.scratch, (*state[product.x].shape[:-1], n))
        return _rows(state[product.y])

    def save(self, folder: Path) -> dict[str, list[list[str | int]]]:
        """Write everything to a folder of its own; returns what `load` needs."""
        names: list[list[str | int]] = []
        for model, states in (("exact", self.exact), ("quantized", self.quantized)):
            for batch, state in enumerate(states):
                for i, (name, value) in enumerate(sorted(state.items())):
                    np.save(folder / f"{model}-{batch}-{i}.npy", value)
                    names.append([model, batch, i, name])
        return {"names": names}

    @staticmethod
    def load(partitioned: PartitionedGraph, scratch: Path, entry: Entry) -> PairedActivations:
        """Both models as they were when `save` wrote them."""
        models: dict[str, dict[int, Feeds]] = {"exact": {}, "quantized": {}}
        for model, batch, i, name in entry.facts["names"]:
            models[model].setdefault(batch, {})[name] = np.load(entry.file(f"{model}-{batch}-{i}.npy"))
        exact, quantized = ([states[batch] for batch in sorted(states)] for states in models.values())
        return PairedActivations(partitioned, scratch, exact, quantized)


def _rows(tensor: Floats) -> Floats:
    return tensor.reshape(-1, tensor.shape[-1])


def _run_all(work: Callable[[T], None], parts: Iterable[T]) -> None:
    for _ in in_order(work, parts):
        pass
