"""Activations between two subgraphs -> the store, so that a run that was stopped goes on with the very numbers it had."""

from __future__ import annotations

import time
from pathlib import Path

from lowbit.pipeline.calibrate.activations import PairedActivations
from lowbit.pipeline.calibrate.subgraphs import PartitionedGraph
from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.store import Entry, Store

SAVE_SECONDS = 60.0
"""Activations are saved once this much work would be lost without them."""


class SavedStates:
    """The newest activations that were saved; there is one entry at a time.

    Args:
        store: of this machine: nobody else has a use for them.
        chains: for each subgraph, the digest of everything that the activations before it depend on.
    """

    def __init__(self, store: Store, chains: list[str]) -> None:
        self.store, self.chains = store, chains
        self.entry: Entry | None = None
        self.time = time.monotonic()

    def load(self, partitioned: PartitionedGraph, scratch: Path, last: int) -> tuple[int, PairedActivations] | None:
        """The newest activations up to those before subgraph number `last`, and that number; None if there are none."""
        for number in range(last, 0, -1):
            if (entry := self.store.get(self._key(number))) is not None:
                self.entry = entry
                return number, PairedActivations.load(partitioned, scratch, entry)
        return None

    def due(self) -> bool:
        """Whether much work would be lost without saving again."""
        return time.monotonic() - self.time > SAVE_SECONDS

    def save(self, number: int, activations: PairedActivations) -> None:
        """Save the activations before a subgraph, and remove those that were saved before."""
        entry = self.store.put(self._key(number), activations.save)
        self.remove()
        self.entry, self.time = entry, time.monotonic()

    def remove(self) -> None:
        """Remove what was saved: nothing will ask for it again."""
        if self.entry is not None:
            self.store.remove(self.entry)

    def _key(self, number: int) -> str:
        return digest("states before", self.chains[number])
