"""What models write after the same words, choosing the likeliest token each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import load_tokenizer
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.report.text_quality import Continuation
from lowbit.pipeline.runtime.session import decode, open_model, open_reference

PROMPTS, PROMPT, NEW_TOKENS = 3, 16, 32
"""How many, how many tokens of each, and how many follow."""


def prompts_of(windows: npt.NDArray[np.int64]) -> list[list[int]]:
    """The beginnings of the first windows of text, int64 [windows, tokens]."""
    return [window[:PROMPT].tolist() for window in windows[:PROMPTS]]


def continuations(
    graph_file: Path, checkpoint: Checkpoint, candidate: Path, windows: npt.NDArray[np.int64]
) -> tuple[Continuation, ...]:
    """For each prompt its text, and what the float model and the quantized one, as it runs, write after it.

    Both models are held in memory, one after the other.
    """
    prompts, tokenizer = prompts_of(windows), load_tokenizer(checkpoint)

    def written(session: onnxruntime.InferenceSession) -> list[str]:
        answers = [greedy(session, prompt, NEW_TOKENS) for prompt in prompts]
        return [tokenizer.decode(answer, skip_special_tokens=False) for answer in answers]

    asked = [tokenizer.decode(prompt, skip_special_tokens=False) for prompt in prompts]
    reference = written(open_reference(load_graph(graph_file, checkpoint)))
    quantized = written(open_model(candidate))
    return tuple(
        Continuation(prompt=prompt, float=theirs, onnxruntime=ours)
        for prompt, theirs, ours in zip(asked, reference, quantized, strict=True)
    )


def greedy(session: onnxruntime.InferenceSession, prompt: list[int], count: int) -> list[int]:
    """`count` tokens after `prompt`, each the likeliest, on the model's cache."""
    past: dict[str, npt.NDArray[np.float32]] | None = None
    ids, chosen = prompt, []
    for _ in range(count):
        scores, past = decode(session, ids, past)
        chosen.append(int(scores.argmax()))
        ids = chosen[-1:]
    return chosen
