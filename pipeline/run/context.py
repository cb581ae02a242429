"""What a run knows, filled from top to bottom."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter

from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.export.support import is_decoder
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.manifest import HandOff
from lowbit.pipeline.report.progress import Record, Steps
from lowbit.pipeline.report.quality import Quality
from lowbit.pipeline.store.models import recall_model
from lowbit.pipeline.store.store import Entry, Store
from lowbit.pipeline.store.weight_keys import SourceDigests, model_digest, shards

RUNTIME_LIBRARIES = ("onnxruntime", "onnx", "tokenizers")
T = TypeVar("T")


@dataclass
class Run:
    """Everything a run knows; filled from top to bottom."""

    recipe: Recipe
    checkpoint: Checkpoint
    store: Store
    steps: Steps
    sources: SourceDigests
    graph_file: Path = Path()
    entries: dict[QuantizedWeight, Entry] = field(default_factory=dict)
    quality: Quality = field(default_factory=Quality)
    hand_offs: dict[str, HandOff] = field(default_factory=dict)

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

    def model_digest(self) -> str:
        """SHA-256 over the configuration and every tensor of the checkpoint, wherever it lies."""
        return model_digest(self.checkpoint, self.sources)


def recall(run: Run, record: Record, kind: TypeAdapter[T], compute: Callable[[], T]) -> T:
    """Figures from the store, or computed and stored."""
    figures, record.cached = recall_model(run.store, record.key, kind, compute)
    return figures
