"""What a fuzzing target is, and seeds that several of them begin with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lowbit.passes.base import PassError
from lowbit.pipeline.errors import PipelineError
from tests.hostile import corpus_checkpoints, corpus_onnx  # noqa: F401  (their cases)
from tests.hostile.corpus import CASES

ALLOWED = (PipelineError, PassError)
"""All that may come out of a reader."""
LARGEST = 1 << 16
"""Bytes of a seed: what is longer is tried too seldom to teach anything."""
MODEL = Path(__file__).parents[1] / "models" / "llama-reasoner"


@dataclass(frozen=True)
class Target:
    """A reader and what it begins with.

    Attributes:
        seeds: inputs, the first of them right.
        attempt: reads one input; raises ALLOWED where it is wrong.
    """

    seeds: list[bytes]
    attempt: Callable[[bytes], None]


def broken(scratch: Path, name: str, *families: str) -> list[bytes]:
    """What the hostile corpus makes of the file `name` of a tiny checkpoint, by `families` of cases."""
    good = scratch / "good"
    good.mkdir()
    for side in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (good / side).write_bytes((MODEL / side).read_bytes())
    save_file({"a": np.zeros((2, 2), np.float32), "b": np.zeros(3, np.float16)}, good / "model.safetensors")
    index = {"weight_map": dict.fromkeys("ab", "model.safetensors")}
    (good / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    found = [(good / name).read_bytes()] if (good / name).exists() else []
    for case, (make, _) in CASES.items():
        if case.startswith(families):
            folder = scratch / case
            folder.mkdir()
            make(folder, good)
            file = folder / "model" / name
            if file.is_file() and not file.is_symlink() and file.stat().st_size <= LARGEST:
                found.append(file.read_bytes())
    return found
