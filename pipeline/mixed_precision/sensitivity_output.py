"""`sensitivity: output_mse`: what a layer reads -> how far a quantized weight moves what it writes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lowbit.pipeline.mixed_precision.sensitivity_blocks import HEAD, BlockwiseMetric, Floats, Measured


class OutputError(BlockwiseMetric):
    """Relative squared error of the layer's outputs, |X (W' - W)^T|^2 / |X W^T|^2, X what the float model gives it."""

    word = "output_mse"

    def blocks(self) -> Measured:
        """Layers from the first block to the output layer."""
        for number, block, hidden in self.states():
            if block is None:
                if HEAD in self.forms:
                    yield from self._errors(HEAD, self.head_input(hidden))
                return
            with torch.no_grad():
                traces, _ = self.watch(block, number, hidden, torch.empty(0, *hidden.shape))
            for name, trace in traces.items():
                yield from self._errors(name, trace.x)

    def _errors(self, name: str, x: Floats) -> Measured:
        def squares(away: Floats, _: slice, rows: Floats) -> npt.NDArray[np.float64]:
            return np.array([np.square(away, dtype=np.float64).sum(), np.square(x @ rows.T, dtype=np.float64).sum()])

        for form, (error, total) in self.score(name, x, squares):
            yield self.by_name[name], form, float(error / max(total, np.finfo(np.float64).tiny))
