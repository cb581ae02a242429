"""An engine against onnxruntime on the same codes: logits, cache, greedy tokens, perplexity, tokenizer, chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from tokenizers import Tokenizer

from lowbit.pipeline.checkpoint.chat_template import CONVERSATIONS
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import load_tokenizer
from lowbit.pipeline.convert.compare_text import TEXTS, compare_chats, compare_ids
from lowbit.pipeline.convert.engine_process import Answer, Request, token_losses
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


Ask = Callable[[Request], dict[str, Answer]]
"""Runs an engine in every one of its modes; the first is in float arithmetic."""


def compare_runtimes(
    engine: str, ask: Ask, model_file: Path, samples: list[Feeds], checkpoint: Checkpoint, new_tokens: int = NEW_TOKENS
) -> EngineOnText:
    """Run an engine, and `model_file` in onnxruntime, on the `input_ids` [1, tokens] of `samples`.

    Args:
        new_tokens: how many the engine writes after each prompt.

    Raises:
        ConvertError: in float arithmetic the two differ by more than rounding.
    """
    session = open_model(model_file, accuracy_level=0)
    windows = np.concatenate([sample["input_ids"] for sample in samples])
    probe = windows[0][:PROBE].tolist()
    request = Request(probe, STEPS, prompts_of(windows), new_tokens, windows.tolist(), TEXTS, CONVERSATIONS)
    losses = [token_losses(_logits(session, ids), ids) for ids in request.windows]
    perplexity = float(np.exp(np.mean(losses)))
    answers, tokenizer = ask(request), load_tokenizer(checkpoint)
    figures = {name: _figures(session, request, answer, tokenizer) for name, answer in answers.items()}
    exact = next(iter(answers))
    _check(engine, figures[exact], perplexity, new_tokens)
    return EngineOnText(
        onnxruntime_perplexity=perplexity, tokens=int(np.size(losses)), tokenizer=compare_ids(answers[exact].ids, tokenizer),
        chat_template=compare_chats(engine, answers[exact].chats, checkpoint), **figures,
    )  # fmt: skip


def _figures(session: onnxruntime.InferenceSession, request: Request, answer: Answer, tokenizer: Tokenizer) -> TextMode:
    """How far an engine's answer is from what onnxruntime makes of the same request."""
    pairs = zip(request.prompts, answer.greedy, strict=True)
    return TextMode(
        relative_error=relative_error(answer.logits, _logits(session, request.probe)),
        cache_relative_error=relative_error(answer.steps, answer.logits[-len(answer.steps) :]),
        perplexity=float(np.exp(answer.losses.mean())),
        greedy_equal=min(_greedy_equal(session, prompt, chosen) for prompt, chosen in pairs),
        continuations=tuple(tokenizer.decode(ids, skip_special_tokens=False) for ids in answer.greedy),
    )


def _check(engine: str, exact: TextMode, perplexity: float, new_tokens: int) -> None:
    """In float arithmetic only rounding may differ; `perplexity` is onnxruntime's."""
    different = new_tokens - exact.greedy_equal
    for what, value, limit in (
        ("logits differ", exact.relative_error, TOLERANCE),
        ("decoding token by token differs from prefill", exact.cache_relative_error, TOLERANCE),
        ("perplexity differs", abs(exact.perplexity / perplexity - 1), PERPLEXITY_TOLERANCE),
        (f"only {exact.greedy_equal} of {new_tokens} greedy tokens are equal", different, 0),
    ):
        if not value <= limit:
            raise ConvertError(
                f"{engine} and onnxruntime disagree on the same codes: {what} ({value:.2e}, at most {limit:.0e} is rounding). "
                "The result is not to be trusted."
            )


def _logits(session: onnxruntime.InferenceSession, ids: list[int]) -> npt.NDArray[np.float32]:
    """Logits [tokens, vocabulary] of a sequence read from scratch."""
    logits: npt.NDArray[np.float32] = session.run(["logits"], decoder_feeds(session, np.array([ids])))[0][0]
    return logits


def _greedy_equal(session: onnxruntime.InferenceSession, prompt: list[int], chosen: list[int]) -> int:
    """How many tokens of an engine's greedy continuation are onnxruntime's, too.

    One run suffices: where each token is the most likely one after those before it, so is the whole continuation.
    """
    likeliest = _logits(session, [*prompt, *chosen[:-1]])[len(prompt) - 1 :].argmax(-1)
    different = np.flatnonzero(likeliest != chosen)
    return int(different[0]) if different.size else len(chosen)
