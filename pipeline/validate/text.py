"""`validate:` the quantized ONNX model against the float model in onnxruntime, on text."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.quant.parallel import in_order
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import load_tokenizer
from lowbit.pipeline.report.text_quality import ScoresAsRun, TextQuality
from lowbit.pipeline.runtime.layerwise import Segments
from lowbit.pipeline.runtime.session import accuracy_levels, decoder_feeds, load_model
from lowbit.pipeline.validate.metrics import score_tokens, summarize
from lowbit.pipeline.validate.reference import Progress, batches, reference_logits
from lowbit.pipeline.validate.worst_windows import worst_windows

SCORED_TOKENS = 64
"""Tokens that one core scores at a time."""


def compare(
    graph_file: Path, checkpoint: Checkpoint, reference: Path, candidate: Path, windows: np.ndarray, progress: Progress,
    as_run: bool = True,
) -> TextQuality:  # fmt: skip
    """Both models on `windows`, block by block; the candidate in exact arithmetic and, where it differs, in its own.

    Args:
        graph_file: the exported float graph.
        reference: what `write_reference` wrote for the same windows.
        candidate: the quantized model.onnx.
        as_run: whether the candidate's own arithmetic is of interest.
    """
    levels = sorted(accuracy_levels(load_model(candidate)) | {0}) if as_run else [0]
    parts = batches(windows, checkpoint)
    runs = []
    for number, level in enumerate((0, None)[: len(levels)]):
        share = lambda done, number=number: progress((number + done) / len(levels))  # noqa: E731
        runs.append(candidate_logits(candidate, level, parts, share))
    scores: list[list[np.ndarray]] = [[] for _ in runs]
    expected = reference_logits(graph_file, checkpoint, reference, map(len, parts))
    for ids, known, *found in zip(parts, expected, *runs, strict=True):
        for kept, logits in zip(scores, found, strict=True):
            kept.append(score_batch(known, logits, ids))
    exact = np.concatenate(scores[0])
    own = [ScoresAsRun(accuracy_levels=tuple(levels[1:]), **dict(summarize(np.concatenate(one)))) for one in scores[1:]]
    worst = worst_windows(exact, windows, load_tokenizer(checkpoint))
    return TextQuality(**dict(summarize(exact)), worst_windows=worst, as_run=own[0] if own else None)


def candidate_logits(file: Path, level: int | None, batches: list[np.ndarray], progress: Progress) -> Iterator[np.ndarray]:
    """Logits of a quantized model at an accuracy_level (None: its own) for each batch of ids."""
    graph = gs.import_onnx(load_model(file, level))
    return Segments(graph, file.parent, "logits").run([decoder_feeds(graph, ids) for ids in batches], progress)


def score_batch(expected: np.ndarray, found: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """`score_tokens` of logits [batch, tokens, vocabulary] that predict ids [batch, tokens]: [batch, tokens - 1, 6]."""
    flat = [np.ascontiguousarray(one[:, :-1]).reshape(-1, one.shape[-1]) for one in (expected, found)]
    targets = ids[:, 1:].reshape(-1)
    pieces = [slice(start, start + SCORED_TOKENS) for start in range(0, len(targets), SCORED_TOKENS)]
    scores = in_order(lambda piece: score_tokens(flat[0][piece], flat[1][piece], targets[piece]), pieces)
    return np.concatenate(list(scores)).reshape(len(ids), -1, 6)
