"""Checkpoints that lie, are cut short or are not there: each is a sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
from lowbit.pipeline.checkpoint.resolve import resolve
from lowbit.pipeline.errors import CheckpointError
from lowbit.pipeline.recipe.load import load_recipe


def folder(tmp_path: Path, **tensors: np.ndarray) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    if tensors:
        save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def weights(path: Path) -> object:
    return open_checkpoint(path, str(path)).weights


def raw(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder(path) / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_weights_are_read_by_rows(tmp_path: Path) -> None:
    a, b = np.arange(12, dtype=np.float32).reshape(4, 3), np.ones(5, np.float16)
    found = open_checkpoint(folder(tmp_path, a=a, b=b), "x").weights
    np.testing.assert_array_equal(found["a"].rows(1, 3), a[1:3])
    np.testing.assert_array_equal(found["b"].load(), b)
    np.testing.assert_array_equal(np.concatenate([rows for _, rows in found["a"].chunks()]), a)


def test_missing_things(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such checkpoint folder"):
        open_checkpoint(tmp_path / "nowhere", "x")
    with pytest.raises(CheckpointError, match=r"no config.json, so this is not"):
        open_checkpoint(tmp_path, "x")
    with pytest.raises(CheckpointError, match=r"no \.safetensors file here"):
        weights(folder(tmp_path))


def test_a_pickle_is_refused_with_the_reason(tmp_path: Path) -> None:
    (folder(tmp_path) / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="A pickle can run any code when it is opened"):
        weights(tmp_path)


def test_a_file_cut_short(tmp_path: Path) -> None:
    path = folder(tmp_path, a=np.ones((100, 100), np.float32)) / "model.safetensors"
    whole = path.read_bytes()
    for size, message in ((len(whole) - 1, "cut short or damaged"), (4, "cut short"), (20, "cut short")):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=message):
            weights(tmp_path)
    path.write_bytes(whole + b"more")
    with pytest.raises(CheckpointError, match="4 bytes follow the last tensor"):
        weights(tmp_path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{nonsense", "its header is damaged"),
        ([1, 2], "not a JSON object"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]}}, "lies at bytes 8 to 24, expected 0"),
        ({"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 16]}}, "has 16 bytes, its shape .* needs 20"),
        ({"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}, r"has the shape \[-4\]"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}, r"has the data_offsets \[16, 0\]"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "has no data_offsets"),
        ({"a": 3}, "has no data_offsets"),
    ],
)
def test_a_header_that_lies(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        weights(raw(tmp_path, header, b"\0" * 16))


def test_a_header_longer_than_the_format_allows(tmp_path: Path) -> None:
    (folder(tmp_path) / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 40) + b"{}")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        weights(tmp_path)


def test_shards(tmp_path: Path) -> None:
    folder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"names the shard 'two.safetensors', which is not in"):
        weights(tmp_path)
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "two.safetensors")
    assert set(open_checkpoint(tmp_path, "x").weights) == {"a", "b"}
    index.write_text(json.dumps({"weight_map": {"a": "../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match="is not a plain file name"):
        weights(tmp_path)


def test_a_tensor_is_in_one_place_and_the_index_knows_it(tmp_path: Path) -> None:
    folder(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    save_file({"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}, tmp_path / "one.safetensors")
    save_file({"b": np.zeros(3, np.float32)}, tmp_path / "two.safetensors")
    for shards, message in (
        (None, r"two.safetensors: has 'b', and so has one.safetensors"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, r"one.safetensors: has 'b', but .*index.json puts it in 'two.safet"),
        ({"a": "one.safetensors"}, r"one.safetensors: has 'b', but .*index.json does not name it"),
        ({}, "does not name shards by the tensors in them"),
    ):
        if shards is not None:
            index.write_text(json.dumps({"weight_map": shards}))
        with pytest.raises(CheckpointError, match=message):
            weights(tmp_path)


def test_the_file_of_all_weights_is_all_there_is(tmp_path: Path) -> None:
    """As in transformers, which reads no other beside it."""
    folder(tmp_path, a=np.ones(2, np.float32))
    save_file({"b": np.ones(3, np.float32)}, tmp_path / "adapter.safetensors")
    assert set(open_checkpoint(tmp_path, "x").weights) == {"a"}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"b": "adapter.safetensors"}}')
    with pytest.raises(CheckpointError, match="has model.safetensors, and an index of other files"):
        weights(tmp_path)
    index.write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert set(open_checkpoint(tmp_path, "x").weights) == {"a"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (
            b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            "'a'",
        ),
        (b'{"a":{"dtype":"F32","shape":[4],"shape":[2,2],"data_offsets":[0,16]}}', "'shape'"),
    ],
)
def test_a_header_that_says_something_twice(tmp_path: Path, header: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"its header is damaged: {message} stands twice in one object"):
        weights(raw(tmp_path, header, b"\0" * 16))


@pytest.mark.parametrize("text", ['{"a": ' + "[" * 65 + "]" * 65 + "}", '{"a": ' + "[" * 900 + "]" * 900 + "}", "[" * 100_000])
def test_json_that_is_nested_too_deep(tmp_path: Path, text: str) -> None:
    (folder(tmp_path) / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match="config.json: not readable as JSON: it is nested more than 64 levels deep"):
        _ = open_checkpoint(tmp_path, "x").config


def test_json_files_that_are_none(tmp_path: Path) -> None:
    path = folder(tmp_path) / "config.json"
    path.write_text("{broken")
    with pytest.raises(CheckpointError, match="not readable as JSON"):
        _ = open_checkpoint(tmp_path, "x").config
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list"):
        _ = open_checkpoint(tmp_path, "x").config


def test_without_a_network_the_error_says_how_to_use_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    path = tmp_path / "mine.yaml"
    path.write_text("model: nobody/nothing\npasses: [{quantize_matmul: {bits: 4}}]")
    with pytest.raises(CheckpointError, match=r"nobody/nothing: cannot be fetched.*make recipe=mine model=/path/to/folder"):
        resolve(load_recipe(path), None, download=False)
