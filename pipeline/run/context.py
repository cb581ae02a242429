"""What a run knows, filled from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from rich.console import Console

from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.onnx_model import OnnxModel
from lowbit.pipeline.export.support import is_decoder
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.progress import Steps
from lowbit.pipeline.report.quality import Quality
from lowbit.pipeline.report.records import HandOff
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.store.digests import digest, sha256
from lowbit.pipeline.store.store import Entry, Store
from lowbit.pipeline.store.weight_keys import SourceDigests, model_digest, shards

RUNTIME_LIBRARIES = ("onnxruntime", "onnx", "tokenizers")
NOWHERE = Path()
NO_TOKENS: npt.NDArray[np.int64] = np.empty((0, 0), np.int64)


@dataclass
class Run:
    """Everything a run knows; filled from top to bottom.

    Attributes:
        work: the folder that results are made in.
        graph_file: the float graph.
        graph: the graph that passes rewrite.
        samples: what models are run on to be compared.
        hidden: file of the float model's states on the text that the result is validated on.
        text: what calibrated methods look at, int64 [windows, tokens].
        entries: the quantized weights.
        keys: what every step made, by its identity.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    store: Store
    steps: Steps
    sources: SourceDigests
    work: Path
    graph_file: Path
    graph: gs.Graph = field(default_factory=gs.Graph)
    hidden: Path = NOWHERE
    samples: list[Feeds] = field(default_factory=list)
    text: npt.NDArray[np.int64] = field(default_factory=NO_TOKENS.copy)
    entries: dict[QuantizedWeight, Entry] = field(default_factory=dict)
    quality: Quality = field(default_factory=Quality)
    hand_offs: dict[str, HandOff] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def key(self, identity: str) -> str:
        """The key of what a step made, or of the model: its `config`uration, all of its `weights`, its float `graph`.

        Weights are read for it; when they were quantized, their digests are known.
        """
        match identity:
            case "config":
                return digest(self.checkpoint.config)
            case "weights":
                return model_digest(self.checkpoint, self.sources)
            case "graph":
                return sha256(self.graph_file)
            case _:
                return self.keys[identity]

    @classmethod
    def begin(cls, recipe: Recipe, checkpoint: Checkpoint, store: Store, console: Console, work: Path = NOWHERE) -> Self:
        """A run that knows nothing yet but its model."""
        graph_file = checkpoint.file if isinstance(checkpoint, OnnxModel) else NOWHERE
        return cls(recipe, checkpoint, store, Steps(console), SourceDigests(store), work, graph_file)

    @property
    def decoder(self) -> bool:
        """Whether the model generates text."""
        return is_decoder(self.checkpoint, self.recipe.export)

    def made(self) -> dict[str, str]:
        """Keys of the quantized weights, by name."""
        return {weight.name: entry.folder.name for weight, entry in self.entries.items()}

    def shards(self) -> dict[str, dict[str, str]]:
        """SHA-256 of every tensor of the checkpoint, by file (in the Hub's cache, its own SHA-256) and name."""
        return shards(self.checkpoint, self.sources)
