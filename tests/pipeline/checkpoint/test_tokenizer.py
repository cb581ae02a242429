"""Ids that end, divide and begin texts, from whichever file says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lowbit.pipeline.checkpoint import tokenizer
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import begin_id, check_tokenizer, document_end, load_tokenizer, stop_ids
from lowbit.pipeline.errors import CheckpointError


def checkpoint(folder: Path, **files: Any) -> Checkpoint:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return Checkpoint(folder, "x")


def test_every_file_may_name_an_end(tmp_path: Path) -> None:
    assert stop_ids(checkpoint(tmp_path)) == []
    assert stop_ids(checkpoint(tmp_path, config={"eos_token_id": 2})) == [2]
    assert stop_ids(checkpoint(tmp_path, generation_config={"eos_token_id": [7, 5]})) == [2, 5, 7]
    assert stop_ids(checkpoint(tmp_path, generation_config={"eos_token_id": 0})) == [0, 2], "0 is an id as any other"
    tokens = {"model": {"vocab": {"<a>": 3}}, "added_tokens": [{"id": 9, "content": "<b>"}]}
    named = {"eos_token": {"content": "<b>"}}
    assert stop_ids(checkpoint(tmp_path, tokenizer=tokens, tokenizer_config=named)) == [0, 2, 9]
    assert stop_ids(checkpoint(tmp_path, tokenizer_config={"eos_token": "<a>"})) == [0, 2, 3]


@pytest.mark.parametrize("value", [-1, 2.0, True, "2", [2, -1], [[2]], {"a": 1}, 1 << 40])
def test_ids_that_are_none(tmp_path: Path, value: Any) -> None:
    for file, read in (("config", begin_id), ("config", document_end), ("config", stop_ids), ("generation_config", stop_ids)):
        (tmp_path / file).mkdir(exist_ok=True)
        found = checkpoint(tmp_path / file, **{file: {"eos_token_id": value}})
        with pytest.raises(CheckpointError, match=f"{file}.json: eos_token_id is "):
            read(found)


@pytest.mark.parametrize(
    "part",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # a panic
        {"normalizer": {"type": "None"}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": 7}},
        {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    ],
)
def test_tokenizers_that_are_none(tmp_path: Path, part: dict[str, Any]) -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer that the tokenizers library reads"):
        load_tokenizer(checkpoint(tmp_path, tokenizer={"model": model, **part}))


GROW = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 6


def test_a_tokenizer_that_takes_too_much(tmp_path: Path) -> None:
    model = {"type": "BPE", "vocab": {"a": 0}, "merges": []}
    check_tokenizer(checkpoint(tmp_path))
    check_tokenizer(checkpoint(tmp_path, tokenizer={"model": model}))
    precompiled = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    with pytest.raises(CheckpointError, match=r"tokenizer.json: not a tokenizer that the tokenizers library reads: .*Panic"):
        check_tokenizer(checkpoint(tmp_path, tokenizer={"model": model, "normalizer": precompiled}))
    with pytest.raises(CheckpointError, match=r"tokenizer.json: takes more than 5 s or 1 GB to read a page of text"):
        check_tokenizer(
            checkpoint(tmp_path, tokenizer={"model": model, "normalizer": {"type": "Sequence", "normalizers": GROW}})
        )


def test_a_tokenizer_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time; time.sleep(600)")  # without processor time
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(tokenizer, "WAIT", 0.5)
    with pytest.raises(CheckpointError, match=r"tokenizer.json: reads no page of text in 0.5 s. Fetch the file again"):
        check_tokenizer(checkpoint(tmp_path, tokenizer={}))


@pytest.mark.parametrize(
    ("config", "between", "first"),
    [
        ({}, [], 0),
        ({"eos_token_id": 2}, [2], 2),
        ({"bos_token_id": 1, "eos_token_id": 2}, [2], 1),
        ({"bos_token_id": None, "eos_token_id": [4, 2]}, [], 4),
    ],
)
def test_what_divides_and_begins_texts(tmp_path: Path, config: dict[str, Any], between: list[int], first: int) -> None:
    found = checkpoint(tmp_path, config=config)
    assert document_end(found) == between
    assert begin_id(found) == first
