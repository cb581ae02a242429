"""A model.onnx that is not as it was written: what is odd is named, before a kernel looks at a byte of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.onnx_io.reader import read_layers
from tests.fuzz.small_result import write_onnx


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("reader") / "onnx")


def attribute(model: onnx.ModelProto, name: str, value: int) -> None:
    node = next(node for node in model.graph.node if node.name == "four")
    next(a for a in node.attribute if a.name == name).i = value


def place(model: onnx.ModelProto, key: str, value: str) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == "four.codes")
    next(entry for entry in tensor.external_data if entry.key == key).value = value


def dims(model: onnx.ModelProto, name: str, *sizes: int) -> None:
    next(t for t in model.graph.initializer if t.name == name).dims[:] = sizes


def test_what_was_written_is_read(written: Path) -> None:
    layers = read_layers(written)
    assert {name: (layer.bits, layer.n, layer.k, layer.is_embedding) for name, layer in layers.items()} == {
        "embed": (4, 8, 32, True), "three": (3, 32, 32, False), "four": (4, 16, 32, False),
    }  # fmt: skip
    assert layers["three"].offsets is not None
    assert layers["four"].zero_points is not None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: attribute(m, "N", 17), "its parts are not those of 17 x 32 weights"),
        (lambda m: attribute(m, "K", 1 << 40), "its parts are not those of 16 x 1099511627776 weights"),
        (lambda m: attribute(m, "K", -32), "its parts are not those of 16 x -32 weights"),
        (lambda m: attribute(m, "bits", 8), "its parts are not those of"),
        (lambda m: attribute(m, "bits", 5), "another width or block"),
        (lambda m: attribute(m, "block_size", 0), "another width or block"),
        (lambda m: dims(m, "four.scales", 16, 1), "its parts are not those of"),
        (lambda m: dims(m, "four.zero_points", 1, 16), "its parts are not those of"),
        (lambda m: dims(m, "four.codes", 1 << 40, 1 << 40), "'four.codes' does not lie in it"),
        (lambda m: dims(m, "four.codes", 16, -2, 8), "'four.codes' does not lie in it"),
        (lambda m: place(m, "offset", "-8"), "'four.codes' does not lie in it"),
        (lambda m: place(m, "offset", "9999"), "'four.codes' does not lie in it"),
        (lambda m: place(m, "location", "../x"), "not in a file beside the model"),
        (lambda m: place(m, "location", "none"), "cannot be opened"),
    ],
)
def test_what_is_odd_is_named(written: Path, change: Callable[[Any], None], message: str) -> None:
    model = onnx.load(str(written), load_external_data=False)
    change(model)
    odd = written.with_name("odd.onnx")
    odd.write_bytes(model.SerializeToString())
    with pytest.raises(PipelineError, match=message):
        read_layers(odd)


def test_names_are_text(written: Path) -> None:
    odd = written.with_name("bytes.onnx")
    odd.write_bytes(written.read_bytes().replace(b"four.codes", b"four.code\xff"))
    with pytest.raises(PipelineError, match=r"has the name b'four.code\\xff', which is no text"):
        read_layers(odd)
    odd.write_bytes(b"nonsense")
    with pytest.raises(PipelineError, match="not an ONNX file, or cut short"):
        read_layers(odd)
