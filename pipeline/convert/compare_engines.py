"""An engine against onnxruntime on the same codes: logits, cache, greedy tokens, perplexity, tokenizer, chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime

from lowbit.pipeline.checkpoint.chat_template import CONVERSATIONS
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import load_tokenizer
from lowbit.pipeline.convert.compare_text import TEXTS, compare_chats, compare_ids
from lowbit.pipeline.convert.engine_process import Measured, Request, token_losses
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.report.engine_quality import EngineOnText, TextMode
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import decoder_feeds, open_model
from lowbit.pipeline.validate.greedy import NEW_TOKENS, prompts_of
from lowbit.pipeline.validate.metrics import relative_error

TOLERANCE = 1e-4
"""Largest relative difference of logits in float arithmetic."""
PERPLEXITY_TOLERANCE = 5e-5
"""Perplexities equal to four digits."""
PROBE, STEPS = 64, 16


def compare_runtimes(
    engine: str,
    modes: dict[str, Callable[[Request], Measured]],
    model_file: Path,
    samples: list[Feeds],
    checkpoint: Checkpoint,
) -> EngineOnText:
    """Run an engine in each of its `modes`, and `model_file` in onnxruntime, on the `input_ids` [1, tokens] of `samples`.

    Args:
        modes: ways to compute, by their names in the result; the first is in float arithmetic.

    Raises:
        ConvertError: in float arithmetic the two differ by more than rounding.
    """
    session = open_model(model_file, accuracy_level=0)
    windows = np.concatenate([sample["input_ids"] for sample in samples])
    probe = windows[0][:PROBE]
    expected = session.run(["logits"], decoder_feeds(session, probe[None]))[0][0]
    losses = [token_losses(session.run(["logits"], decoder_feeds(session, w[None]))[0][0], w.tolist()) for w in windows]
    perplexity = float(np.exp(np.mean(losses)))
    prompts, tokenizer = prompts_of(windows), load_tokenizer(checkpoint)
    request = Request(probe.tolist(), STEPS, prompts, NEW_TOKENS, windows.tolist(), TEXTS, CONVERSATIONS)
    measured = {name: run(request) for name, run in modes.items()}
    figures = {
        name: TextMode(
            relative_error=relative_error(found.logits, expected),
            cache_relative_error=relative_error(found.steps, found.logits[-len(found.steps) :]),
            perplexity=float(np.exp(found.losses.mean())),
            greedy_equal=min(_greedy_equal(session, *pair) for pair in zip(prompts, found.greedy, strict=True)),
            continuations=tuple(tokenizer.decode(one, skip_special_tokens=False) for one in found.greedy),
        )
        for name, found in measured.items()
    }
    exact, texts = figures[next(iter(modes))], measured[next(iter(modes))]
    drift = abs(exact.perplexity / perplexity - 1)
    for what, value, limit in (
        ("logits differ", exact.relative_error, TOLERANCE),
        ("decoding token by token differs from prefill", exact.cache_relative_error, TOLERANCE),
        ("perplexity differs", drift, PERPLEXITY_TOLERANCE),
        (f"only {exact.greedy_equal} of {NEW_TOKENS} greedy tokens are equal", NEW_TOKENS - exact.greedy_equal, 0),
    ):
        if not value <= limit:
            raise ConvertError(
                f"{engine} and onnxruntime disagree on the same codes: {what} ({value:.2e}, at most {limit:.0e} is rounding). "
                "The result is not to be trusted."
            )
    return EngineOnText(
        onnxruntime_perplexity=perplexity, tokens=int(np.size(losses)), tokenizer=compare_ids(texts.ids, tokenizer),
        chat_template=compare_chats(engine, texts.chats, checkpoint), **figures,
    )  # fmt: skip


def _greedy_equal(session: onnxruntime.InferenceSession, prompt: list[int], chosen: list[int]) -> int:
    """How many tokens of an engine's greedy continuation are onnxruntime's, too.

    One run suffices: where each token is the most likely one after those before it, so is the whole continuation.
    """
    ids = np.array([[*prompt, *chosen[:-1]]])
    likeliest = session.run(["logits"], decoder_feeds(session, ids))[0][0, len(prompt) - 1 :].argmax(-1)
    different = np.flatnonzero(likeliest != chosen)
    return int(different[0]) if different.size else len(chosen)
