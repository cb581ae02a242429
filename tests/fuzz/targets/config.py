"""config.json, and the RoPE settings of transformers 5 in it."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.checkpoint.config import translated
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from tests.fuzz.target import Target, broken


def prepare(folder: Path) -> Target:
    file = folder / "config.json"

    def attempt(data: bytes) -> None:
        file.write_bytes(data)
        translated(Checkpoint(folder, "fuzz").config, file)

    return Target(broken(folder, file.name, "config_", "dimensions_", "option_", "options_", "content_config"), attempt)
