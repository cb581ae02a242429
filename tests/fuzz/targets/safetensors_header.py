"""A .safetensors file: its header, and the rows of every weight that it names."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.checkpoint.safetensors_file import read_header
from tests.fuzz.target import Target, broken


def prepare(folder: Path) -> Target:
    file = folder / "model.safetensors"

    def attempt(data: bytes) -> None:
        file.write_bytes(data)
        for weight in read_header(file).values():
            for _ in weight.chunks():
                pass

    return Target(broken(folder, file.name, "header_", "entry_", "two_shards"), attempt)
