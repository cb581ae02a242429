"""Weights on their way to the data file: the bytes that were asked for, each source read once, each content stored once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from lowbit.passes.methods.mse import Mse
from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import ArrayWeight, Weight
from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
from lowbit.pipeline.checkpoint.safetensors_file import CheckpointWeight
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.onnx_io.stream import Streamed, stream_weights
from lowbit.pipeline.onnx_io.writer import DataFile
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import HashedWeight, SourceDigests
from tests.graphs import random

FORM = BlockFormat(3, 32, False, "fp16")


def stream(weights: dict[str, Weight], folder: Path) -> tuple[Streamed, bytes]:
    folder.mkdir(exist_ok=True)
    store = Store(folder / ".store")
    path = folder / "data"
    path.unlink(missing_ok=True)
    data = DataFile(path)
    done: list[tuple[int, int]] = []
    streamed = stream_weights(weights, SourceDigests(store), store, data, lambda *shares: done.append(shares), {})
    data.close()
    assert done[-1][0] == done[-1][1], "all that was to be read was read"
    return streamed, path.read_bytes()


def graph_weights(folder: Path) -> dict[str, Weight]:
    """A float weight and two quantized ones of a checkpoint; a tied layer that asks for the same codes once more."""
    found = open_checkpoint(folder, "").weights
    layers = {
        name: QuantizedWeight(name, found[f"model.layers.{name}.weight"], FORM, Mse())
        for name in ("0.mlp.up_proj", "1.mlp.up_proj")
    }
    layers["tied"] = QuantizedWeight("tied", layers["0.mlp.up_proj"].source, FORM, Mse())
    weights: dict[str, Weight] = {"model.norm.weight": found["model.norm.weight"]}
    for name, layer in layers.items():
        weights |= {f"{name}.{part}": values for part, values in layer.parts.items()}
    return weights


@pytest.mark.parametrize("memory", [1, 1 << 40], ids=["forgetting pages", "keeping pages"])
def test_the_data_file_holds_what_each_weight_says(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: int
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=memory))
    weights = graph_weights(tiny())
    streamed, data = stream(weights, tmp_path / "first")
    assert list(streamed.places) == list(weights)
    for name, weight in weights.items():
        offset, length = streamed.places[name]
        assert data[offset : offset + length] == weight.load().tobytes(), name
    assert streamed.places["tied.codes"] == streamed.places["0.mlp.up_proj.codes"], "equal contents are stored once"
    assert (len(streamed.entries), streamed.recalled) == (3, 1), "of two equal ones the second is recalled"
    again, same = stream(weights, tmp_path / "first")
    assert (again.recalled, same) == (3, data)
    assert {w.name: e.folder for w, e in again.entries.items()} == {w.name: e.folder for w, e in streamed.entries.items()}


def test_a_source_is_read_once_where_it_was_never_read_before(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    rows = CheckpointWeight.rows
    monkeypatch.setattr(CheckpointWeight, "rows", lambda self, *a: (read.append(self.name), rows(self, *a))[1])
    weights = graph_weights(tiny("llama"))
    stream(weights, tmp_path / "build")
    assert sorted(read) == ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]


def test_the_digest_is_that_of_shape_dtype_and_bytes() -> None:
    array = random(3000, 300)
    hashed = HashedWeight(ArrayWeight(array))
    chunks = [rows for _, rows in hashed.chunks()]
    assert len(chunks) > 1
    np.testing.assert_array_equal(np.concatenate(chunks), array)
    assert hashed.sha.hexdigest() == hashlib.sha256(json.dumps([[3000, 300], 1]).encode() + array.tobytes()).hexdigest()


def test_a_float_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    array = random(8, 4)
    array[5, 1] = np.inf
    with pytest.raises(PipelineError, match=r"^'embed': a weight from row 0 on is NaN or infinite"):
        stream({"embed": ArrayWeight(array)}, tmp_path)
