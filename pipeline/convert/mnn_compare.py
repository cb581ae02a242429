"""MNN's runtime against onnxruntime on the same codes: logits, cache, greedy tokens, perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from pipeline.checkpoint import Checkpoint
from pipeline.convert.mnn_folder import relative_error
from pipeline.convert.mnn_llm import Measured, measure, token_losses
from pipeline.convert.mnn_text import CONVERSATIONS, TEXTS, compare_chats, compare_ids
from pipeline.errors import ConvertError
from pipeline.sessions import decoder_feeds, open_model
from pipeline.validate import load_tokenizer

TOLERANCE = 1e-4
"""Largest relative difference of logits in float arithmetic (memory "high")."""
PERPLEXITY_TOLERANCE = 5e-5
"""Perplexities equal to four digits."""
PROMPT, NEW_TOKENS = 16, 32


def compare_runtimes(
    model_file: Path, folder: Path, windows: np.ndarray, checkpoint: Checkpoint, scratch: Path
) -> dict[str, Any]:
    """Run `folder` in MNN and `model_file` in onnxruntime on `windows`, int64 [windows, tokens].

    Returns:
        Figures of both memory modes, the tokenizer and the chat template, ready for the manifest.

    Raises:
        ConvertError: in float arithmetic the two differ by more than rounding.
    """
    session = open_model(model_file, accuracy_level=0)
    probe = windows[0][:64]
    expected = session.run(["logits"], decoder_feeds(session, probe[None]))[0][0]
    greedy = _greedy(session, probe[:PROMPT])
    losses = [token_losses(session.run(["logits"], decoder_feeds(session, w[None]))[0][0], w.tolist()) for w in windows]
    perplexity = float(np.exp(np.mean(losses)))
    figures: dict[str, Any] = {"onnxruntime_perplexity": perplexity, "tokens": int(np.size(losses))}
    prompt = probe[:PROMPT].tolist()
    for memory in ("high", "low"):
        found = measure(folder, memory, probe.tolist(), prompt, NEW_TOKENS, windows, TEXTS, CONVERSATIONS, scratch)
        figures[f"memory_{memory}"] = _figures(found, expected, greedy)
    figures["tokenizer"] = compare_ids(found.ids, load_tokenizer(checkpoint))
    figures["chat_template"] = compare_chats(found.chats, checkpoint)
    exact = figures["memory_high"]
    if not exact["relative_error"] <= TOLERANCE:
        _fail("logits differ", exact["relative_error"], TOLERANCE)
    if not exact["cache_relative_error"] <= TOLERANCE:
        _fail("decoding token by token differs from prefill", exact["cache_relative_error"], TOLERANCE)
    if exact["greedy_equal"] != NEW_TOKENS:
        _fail(f"greedy tokens differ from token {exact['greedy_equal'] + 1}", NEW_TOKENS, NEW_TOKENS)
    drift = abs(exact["perplexity"] / perplexity - 1)
    if not drift <= PERPLEXITY_TOLERANCE:
        _fail("perplexity differs", drift, PERPLEXITY_TOLERANCE)
    return figures


def _figures(found: Measured, expected: np.ndarray, greedy: list[int]) -> dict[str, Any]:
    half = len(expected) - len(found.steps)
    pairs = zip(found.greedy, greedy, strict=True)
    return {
        "relative_error": relative_error(found.logits, expected),
        "cache_relative_error": relative_error(found.steps, found.logits[half:]),
        "greedy_equal": next((i for i, (a, b) in enumerate(pairs) if a != b), len(greedy)),
        "perplexity": float(np.exp(found.losses.mean())),
    }


def _greedy(session: onnxruntime.InferenceSession, prompt: np.ndarray) -> list[int]:
    """The most likely continuation of `prompt`, one token at a time on the graph's own cache."""
    names = [output.name for output in session.get_outputs()]
    ids, chosen = prompt[None], []
    past: dict[str, np.ndarray] = {}
    for _ in range(NEW_TOKENS):
        results = dict(zip(names, session.run(names, decoder_feeds(session, ids, past)), strict=True))
        chosen.append(int(results.pop("logits")[0, -1].argmax()))
        past = {name.replace("present", "past_key_values"): value for name, value in results.items()}
        ids = np.array([[chosen[-1]]])
    return chosen


def _fail(what: str, found: float, limit: float) -> None:
    raise ConvertError(
        f"MNN and onnxruntime disagree on the same codes: {what} ({found:.2e}, at most {limit:.0e} is rounding). "
        "The result is not to be trusted."
    )
