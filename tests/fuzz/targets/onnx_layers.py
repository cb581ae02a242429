"""A model.onnx that says it is a result of ours: its quantized layers, and every row of them."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.onnx_io.reader import read_layers
from tests.fuzz.small_result import write_onnx
from tests.fuzz.target import Target


def prepare(folder: Path) -> Target:
    file = write_onnx(folder / "onnx")

    def attempt(data: bytes) -> None:
        file.write_bytes(data)
        for layer in read_layers(file).values():
            for start, stop in layer.row_ranges():
                layer.block_rows(start, stop)

    return Target([file.read_bytes()], attempt)
