"""The float model and the one quantized so far, side by side through the stages of a graph, hidden states in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto

from lowbit.passes.quant.hessian import Hessian, Moments
from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.calibrate.subgraphs import Product, Stages
from lowbit.pipeline.onnx_io.reader import stored_as_entry
from lowbit.pipeline.runtime.memory import return_memory
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import decoder_feeds
from lowbit.pipeline.store.scratch import LARGE, room
from lowbit.pipeline.store.store import Entry

BATCH_TOKENS = 4096
"""Tokens that go through onnxruntime at once."""
DAMPING = 0.01
"""Of the second moments, where a layer's weights are corrected for the errors before them."""


@dataclass
class SideBySide:
    """Both models at the same place in the graph.

    Attributes:
        scratch: a folder for what is too large for memory.
        exact, quantized: for each batch of windows, the tensors that later stages read, by name.
    """

    stages: Stages
    scratch: Path
    exact: list[Feeds]
    quantized: list[Feeds] = field(default_factory=list)

    @staticmethod
    def begin(stages: Stages, scratch: Path, windows: np.ndarray) -> SideBySide:
        """Before the first stage of windows int64 [windows, tokens], some of them at a time."""
        size = max(1, BATCH_TOKENS // windows.shape[1])
        batches = [windows[start : start + size] for start in range(0, len(windows), size)]
        return SideBySide(stages, scratch, [decoder_feeds(stages.graph, ids) for ids in batches])

    def run(self, number: int) -> None:
        """Run what leads to the products of a stage."""
        self._run(number, self.exact + self.quantized)
        if not self.quantized:  # nothing was quantized before the first products
            self.quantized = [dict(state) for state in self.exact]

    def run_exact(self, number: int) -> None:
        """`run` of the float model alone."""
        self._run(number, self.exact)

    def _run(self, number: int, states: list[Feeds]) -> None:
        for state in self.stages.run(number, states):
            for name, value in state.items():
                if value.nbytes >= LARGE and not isinstance(value, np.memmap):
                    state[name] = room(self.scratch, value.shape, value.dtype)
                    state[name][...] = value

    def moments(self, x: str) -> Hessian:
        """Second moments of an input of the quantized model's products."""
        sums = Moments(self.quantized[0][x].shape[-1])
        for state in self.quantized:
            sums.add(_rows(state[x]))
        return sums.hessian()

    def drift(self, x: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each batch how far an input is from the float model's, and the input; float32 [tokens, K] both."""
        pairs = []
        for exact, quantized in zip(self.exact, self.quantized, strict=True):
            away = room(self.scratch, exact[x].shape)
            np.subtract(exact[x], quantized[x], out=away)
            pairs.append((_rows(away), _rows(quantized[x])))
        return pairs

    def sample(self, x: str, tokens: int) -> np.ndarray:
        """An input of the float model at about so many places, evenly spread over the text, float32 [places, K]."""
        inputs = [_rows(state[x]) for state in self.exact]
        step = -(-sum(map(len, inputs)) // tokens)
        starts = np.cumsum([0, *map(len, inputs)])
        return np.concatenate([rows[-start % step :: step] for start, rows in zip(starts, inputs, strict=False)])

    def multiply_exact(self, product: Product) -> None:
        """The float model's y of a product."""
        weight = product.weight.source
        outputs = [self._output(state, product, weight.shape[0]) for state in self.exact]

        def one(piece: tuple[int, np.ndarray]) -> None:
            rows = piece[1].astype(np.float32).T
            for state, y in zip(self.exact, outputs, strict=True):
                y[:, piece[0] : piece[0] + rows.shape[1]] = _rows(state[product.x]) @ rows

        for _ in in_order(one, weight.chunks()):
            pass

    def multiply_quantized(self, product: Product, entry: Entry) -> None:
        """The quantized model's y, by the codes of an entry."""
        layer = stored_as_entry(product.weight, entry.folder)
        outputs = [self._output(state, product, layer.n) for state in self.quantized]

        def one(rows: tuple[int, int]) -> None:
            values = layer.block_rows(*rows).dequantize(layer.k).T
            for state, y in zip(self.quantized, outputs, strict=True):
                y[:, rows[0] : rows[1]] = _rows(state[product.x]) @ values

        for _ in in_order(one, layer.row_ranges()):
            pass

    def release(self, number: int) -> None:
        """Let go of what only the products of a stage read."""
        later = self.stages.read_after(number)
        for state in self.exact + self.quantized:
            for name in [name for name in state if name not in later]:
                del state[name]
        return_memory()

    def _output(self, state: Feeds, product: Product, n: int) -> np.ndarray:
        """Make room for y in a state; as [tokens, n]."""
        state[product.y] = room(self.scratch, (*state[product.x].shape[:-1], n))
        return _rows(state[product.y])

    def save(self, folder: Path) -> dict[str, Any]:
        """Write everything to a folder of its own; returns what `load` needs."""
        names = []
        for model, states in (("exact", self.exact), ("quantized", self.quantized)):
            for batch, state in enumerate(states):
                for i, (name, value) in enumerate(sorted(state.items())):
                    np.save(folder / f"{model}-{batch}-{i}.npy", value)
                    names.append([model, batch, i, name])
        return {"names": names}

    @staticmethod
    def load(stages: Stages, scratch: Path, entry: Entry) -> SideBySide:
        """Both models as they were when `save` wrote them."""
        found: dict[str, dict[int, Feeds]] = {"exact": {}, "quantized": {}}
        for model, batch, i, name in entry.facts["names"]:
            found[model].setdefault(batch, {})[name] = np.load(entry.file(f"{model}-{batch}-{i}.npy"))
        return SideBySide(stages, scratch, *([states[batch] for batch in sorted(states)] for states in found.values()))


class CorrectedWeight(Weight):
    """W + W D^T X (X^T X)^-1 with D = exact inputs - X: the least-squares weight for the float model's outputs, by rows.

    X are the inputs that the quantized layers before make. Minimizing |(X + D) W^T - X W'^T| is GPTAQ's asymmetric objective
    (Li et al., arXiv:2504.02692); solved for W' first and then rounded as any weight, it is the first step of
    Qronos (Zhang et al., arXiv:2505.11695).

    Args:
        source: W, [N, K].
        drift: batches of (D, X), as `SideBySide.drift` gives them.
        hessian: X^T X over the tokens.
    """

    def __init__(self, source: Weight, drift: list[tuple[np.ndarray, np.ndarray]], hessian: Hessian) -> None:
        super().__init__(source.shape, TensorProto.FLOAT)
        self.source, self.drift, self.hessian = source, drift, hessian

    def rows(self, start: int, stop: int) -> np.ndarray:
        w = self.source.rows(start, stop).astype(np.float32)
        pull = np.zeros(w.shape, np.float32)
        for away, x in self.drift:
            pull += (away @ w.T).T @ x
        return w + self.hessian.solve(pull / np.float32(sum(len(x) for _, x in self.drift)), DAMPING)


def _rows(tensor: np.ndarray) -> np.ndarray:
    return tensor.reshape(-1, tensor.shape[-1])
