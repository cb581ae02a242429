"""Entries of quantized weights -> layers of a module in torch that can be trained, and back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.passes.quant.format import Blocks
from lowbit.passes.quant.quantized_weight import Chunk, QuantizedWeight
from lowbit.pipeline.calibrate.fake_quant_linear import TrainedLinear
from lowbit.pipeline.onnx_io.entry import write_chunks
from lowbit.pipeline.onnx_io.stored_layer import stored_as_entry
from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.store import Entry, Store

Trained = dict[QuantizedWeight, TrainedLinear]
"""The layers of a module that are to be trained, by their weights."""


class TrainedEntries:
    """The newest entry of every quantized weight.

    Args:
        entries: those to begin with.
        chain: digest of everything that training depends on.
    """

    def __init__(self, entries: dict[QuantizedWeight, Entry], chain: str, store: Store) -> None:
        self.entries, self.chain, self.store = dict(entries), chain, store

    def insert(self, module: Any, weights: list[QuantizedWeight], prefix: str) -> Trained:
        """Put the codes of weights in place of float ones.

        Args:
            module: of torch; its layers are called as the weights are, without `prefix`.

        Returns:
            The layers that a pass marked for training.
        """
        trained = {}
        for weight in weights:
            name = weight.name.removeprefix(prefix)
            linear = TrainedLinear(weight, self._blocks(weight), module.get_submodule(name))
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, linear)
            if weight.training is not None:
                trained[weight] = linear
            else:
                linear.requires_grad_(False)
        return trained

    def recall(self, trained: Trained, phase: str) -> bool:
        """Let the layers be what was trained before in a phase; whether all of it is there."""
        known = {weight: entry for weight in trained if (entry := self.store.get(self._key(weight, phase))) is not None}
        if len(known) < len(trained):
            return False
        self.entries |= known
        for weight, linear in trained.items():
            linear.settle(self._blocks(weight))
        return True

    def keep(self, trained: Trained, phase: str) -> None:
        """Store what was trained in a phase, and let the layers be exactly that."""
        for weight, linear in trained.items():
            blocks = linear.blocks()
            linear.settle(blocks)
            self.entries[weight] = self.store.put(self._key(weight, phase), partial(_write, weight, blocks))

    def _blocks(self, weight: QuantizedWeight) -> Blocks:
        layer = stored_as_entry(weight, self.entries[weight].folder)
        parts = [layer.block_rows(*rows) for rows in layer.row_ranges()]
        return Blocks(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("codes", "scales", "zero_points")))

    def _key(self, weight: QuantizedWeight, phase: str) -> str:
        return digest(self.chain, phase, weight.name)


def _write(weight: QuantizedWeight, blocks: Blocks, folder: Path) -> dict[str, float]:
    return write_chunks(weight, _chunks(weight, blocks), folder)


def _chunks(weight: QuantizedWeight, blocks: Blocks) -> Iterator[Chunk]:
    for start, rows in weight.source.chunks():
        here = slice(start, start + len(rows))
        yield weight.chunk(start, rows, Blocks(blocks.codes[here], blocks.scales[here], blocks.zero_points[here]))
