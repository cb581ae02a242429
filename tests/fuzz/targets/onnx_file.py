"""A stranger's ONNX file with external data beside it."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.checkpoint.onnx_model import OnnxModel
from tests.fuzz.target import Target, broken
from tests.hostile.corpus import onnx_model


def prepare(folder: Path) -> Target:
    families = ("external_", "onnx_", "opset_", "weight_type_", "constant_", "loop_")
    file = onnx_model(folder / "here")
    seeds = [file.read_bytes(), *broken(folder, file.name, *families)]

    def attempt(data: bytes) -> None:
        file.write_bytes(data)
        _ = OnnxModel(file.parent, "fuzz", None, file).weights

    return Target(seeds, attempt)
