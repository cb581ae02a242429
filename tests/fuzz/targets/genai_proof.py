"""The model.onnx of onnxruntime-genai's folder against a good one."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.convert.genai.proof import prove
from tests.fuzz.small_result import write_onnx
from tests.fuzz.target import Target


def prepare(folder: Path) -> Target:
    ours, theirs = write_onnx(folder / "onnx"), write_onnx(folder / "genai")

    def attempt(data: bytes) -> None:
        theirs.write_bytes(data)
        prove(ours, theirs)

    return Target([theirs.read_bytes()], attempt)
