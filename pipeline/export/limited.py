"""An export within limits: for a process of its own, since what holds it in stays with the process."""

from __future__ import annotations

import math
import os
from pathlib import Path

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.export.exporter import export_graph
from lowbit.pipeline.export.support import VISION
from lowbit.pipeline.limits import export_limits, limit_memory, limit_seconds
from lowbit.pipeline.recipe.sections import Export


def export_within_limits(checkpoint: Checkpoint, options: Export, path: Path) -> None:
    """`export_graph`, in a process that may take as much time and memory as a model of so many weights needs.

    Raises:
        ExportError: see `export_graph`; it takes more memory than that, too.
    """
    # before their memory counts
    import transformers  # noqa: F401

    weights = checkpoint.weights.values()
    real = checkpoint.config.get("model_type") in VISION  # the others are traced without their values
    values = sum(4 * math.prod(weight.shape) for weight in weights) if real else 0
    seconds, size = export_limits(len(weights), values, os.cpu_count() or 1)
    limit_seconds(seconds)
    limit_memory(size)
    export_graph(checkpoint, options, path)
