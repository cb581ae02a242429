"""Right and wrong: problems of the reasoning model, solved by a quantized model in onnxruntime."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from lowbit.pipeline.runtime.session import decoder_feeds, open_model

MODEL = Path(__file__).parents[1] / "models" / "llama-reasoner"
LONGEST = 130
"""Tokens after the question; the longest solution has fewer."""


def problems(count: int, seed: int) -> list[tuple[str, str]]:
    """Questions and their answers, as the model was trained on."""
    spec = importlib.util.spec_from_file_location("reasoner", MODEL / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rng = random.Random(seed)
    return [(question, answer) for question, _, answer in (module.problem(rng) for _ in range(count))]


def accuracy(model_file: Path, count: int = 200, seed: int = 12345) -> float:
    """Share of exactly right answers, decoded greedily; the seed is never trained or calibrated on."""
    session = open_model(model_file, accuracy_level=0)
    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    groups: dict[int, list[tuple[list[int], str]]] = {}
    for question, answer in problems(count, seed):
        ids = tokenizer.encode(question).ids
        groups.setdefault(len(ids), []).append((ids, answer))
    right = 0
    for group in groups.values():
        written = _decode(session, np.array([ids for ids, _ in group]))
        for row, (_, answer) in zip(written, group, strict=True):
            text = tokenizer.decode(row.tolist(), skip_special_tokens=False)
            right += text.split("</think>")[-1].split("<|endoftext|>")[0].strip() == answer
    return right / count


def _decode(session: Any, ids: np.ndarray) -> np.ndarray:
    """What follows ids [rows, tokens], greedily; int64 [rows, LONGEST]."""
    names = [output.name for output in session.get_outputs()]
    past: dict[str, np.ndarray] = {}
    written = np.empty((len(ids), LONGEST), np.int64)
    for i in range(LONGEST):
        found = dict(zip(names, session.run(names, decoder_feeds(session, ids, past)), strict=True))
        ids = found["logits"][:, -1:].argmax(-1)
        written[:, i] = ids[:, 0]
        past = {name.replace("present", "past_key_values"): value for name, value in found.items() if name != "logits"}
    return written
