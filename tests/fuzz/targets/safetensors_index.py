"""The index of a checkpoint's shards."""

from __future__ import annotations

import shutil
from pathlib import Path

from lowbit.pipeline.checkpoint.huggingface import INDEX, Checkpoint
from tests.fuzz.target import Target, broken


def prepare(folder: Path) -> Target:
    seeds = broken(folder, INDEX, "index_", "shard_", "shard_map_", "content_model")
    here = shutil.copytree(folder / "good", folder / "here")

    def attempt(data: bytes) -> None:
        (here / INDEX).write_bytes(data)
        _ = Checkpoint(here, "fuzz").weights

    return Target(seeds, attempt)
