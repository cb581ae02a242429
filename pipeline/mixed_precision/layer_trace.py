"""Linear layers while a model runs -> what they read, and the gradients at what they write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lowbit.pipeline.store.scratch import scratch_array


class LayerTrace:
    """What a linear layer read, window by window, and how much its outputs matter; large arrays lie on the disk.

    Attributes:
        x: inputs, float32 [tokens, K].
        windows: number of the window of each token, int64 [tokens].
        gradients: of the log-likelihood of sampled texts by the layer's outputs, float32 [samples, tokens, N].
    """

    def __init__(self, scratch: Path, tokens: int, shape: tuple[int, ...], samples: int) -> None:
        n, k = shape
        self.x, self.windows = scratch_array(scratch, (tokens, k)), np.empty(tokens, np.int64)
        self.gradients = scratch_array(scratch, (samples, tokens, n))
        self.count = 0

    def add(self, window: int, x: torch.Tensor, gradients: list[torch.Tensor]) -> None:
        """Add what the layer read of a window; an expert reads some of its tokens, or none."""
        rows = x.detach().reshape(-1, x.shape[-1]).numpy()
        here = slice(self.count, self.count + len(rows))
        self.x[here], self.windows[here] = rows, window
        for sample, gradient in enumerate(gradients):
            self.gradients[sample, here] = gradient.reshape(-1, gradient.shape[-1]).numpy()
        self.count += len(rows)

    def close(self) -> None:
        """Cut the arrays to the tokens that were read."""
        self.x, self.windows, self.gradients = self.x[: self.count], self.windows[: self.count], self.gradients[:, : self.count]


@contextmanager
def recording(block: Any, names: list[str]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Input and output of the linear layers of a block that are called `names`, as they are run."""
    records: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def record(name: str, _: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        records[name] = inputs[0], output

    handles = [block.get_submodule(name).register_forward_hook(partial(record, name)) for name in names]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()
