"""`validate:` the quantized ONNX model against the float model in onnxruntime, on text."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from lowbit.passes.quant.parallel import in_order
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import load_tokenizer
from lowbit.pipeline.onnx_io.reader import read_layers
from lowbit.pipeline.report.text_quality import ScoresAsRun, TextQuality
from lowbit.pipeline.runtime.dequantized import dequantized_graph
from lowbit.pipeline.runtime.layerwise import LayerwiseModel
from lowbit.pipeline.runtime.session import accuracy_levels, decoder_feeds, load_model
from lowbit.pipeline.validate.head import head_of
from lowbit.pipeline.validate.metrics import score_tokens, summarize
from lowbit.pipeline.validate.reference import Progress, batches, reference_logits
from lowbit.pipeline.validate.worst_windows import worst_windows

SCORED_TOKENS = 64
"""Tokens that one core scores at a time."""
NO_KERNEL = "onnxruntime multiplies these weights in float32, as the exact figures do; there is no other kernel to measure"
Scores = npt.NDArray[np.float64]
"""Of `score_tokens`, [windows, tokens - 1, 6]."""


def compare(
    graph_file: Path, checkpoint: Checkpoint, reference: Path, candidate: Path, windows: npt.NDArray[np.int64],
    progress: Progress, as_run: bool = True,
) -> TextQuality:  # fmt: skip
    """Both models on `windows`, block by block; the candidate in exact arithmetic and, where it differs, in its own.

    Exact: weights are dequantized and multiplied in float32, like those of the float model.

    Args:
        graph_file: the exported float graph.
        reference: what `write_reference` wrote for the same windows.
        candidate: the quantized model.onnx.
        as_run: whether the candidate's own arithmetic is of interest.
    """
    levels = sorted(level for level in rounding_levels(candidate) if level) if as_run else []
    parts, makers = batches(windows, checkpoint), [exact_logits, *([logits_as_run] if levels else [])]

    def share(number: int, done: float) -> None:
        progress((number + done) / len(makers))

    runs = [make(candidate, parts, partial(share, number)) for number, make in enumerate(makers)]
    scores: list[list[Scores]] = [[] for _ in runs]
    references = reference_logits(graph_file, checkpoint, reference, map(len, parts))
    for ids, expected, *candidates in zip(parts, references, *runs, strict=True):
        for batches_of_run, logits in zip(scores, candidates, strict=True):
            batches_of_run.append(score_batch(expected, logits, ids))
    exact, *rounded = (np.concatenate(batches_of_run) for batches_of_run in scores)
    return TextQuality(
        **dict(summarize(exact)),
        worst_windows=worst_windows(exact, windows, load_tokenizer(checkpoint)),
        as_run_skipped=None if rounded or not as_run else NO_KERNEL,
        as_run=ScoresAsRun(accuracy_levels=tuple(levels), **dict(summarize(rounded[0]))) if rounded else None,
    )


def rounding_levels(file: Path) -> set[int]:
    """The accuracy_levels of a quantized model's products that onnxruntime looks at.

    Where zero points are floats it has no kernel but the exact one: it dequantizes on every call and multiplies as float32.
    """
    free = {name for name, layer in read_layers(file).items() if layer.offsets is not None}
    model = load_model(file)
    rest = [node for node in model.graph.node if node.name not in free]
    del model.graph.node[:]
    model.graph.node.extend(rest)
    return accuracy_levels(model)


def exact_logits(file: Path, batches: list[npt.NDArray[np.int64]], progress: Progress) -> Iterator[npt.NDArray[np.float32]]:
    """Logits of a quantized model in float32, [batch, tokens, vocabulary] for each batch of ids.

    Weights are dequantized once, block by block, and not kept.
    """
    graph = dequantized_graph(file)
    head = head_of(graph)
    model = LayerwiseModel(graph, file.parent, head.hidden.name)
    product = head.product()
    return map(product, model.run([decoder_feeds(graph, ids) for ids in batches], progress))


def logits_as_run(file: Path, batches: list[npt.NDArray[np.int64]], progress: Progress) -> Iterator[npt.NDArray[np.float32]]:
    """The same by onnxruntime's own kernels, at the accuracy_level that each has."""
    graph = gs.import_onnx(load_model(file))
    return LayerwiseModel(graph, file.parent, "logits").run([decoder_feeds(graph, ids) for ids in batches], progress)


def score_batch(expected: npt.NDArray[np.float32], logits: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]) -> Scores:
    """`score_tokens` of logits [batch, tokens, vocabulary] that predict ids [batch, tokens]: [batch, tokens - 1, 6]."""
    flat = [np.ascontiguousarray(side[:, :-1]).reshape(-1, side.shape[-1]) for side in (expected, logits)]
    targets = ids[:, 1:].reshape(-1)
    rows = [slice(start, start + SCORED_TOKENS) for start in range(0, len(targets), SCORED_TOKENS)]
    scores = in_order(lambda some: score_tokens(flat[0][some], flat[1][some], targets[some]), rows)
    return np.concatenate(list(scores)).reshape(len(ids), -1, 6)
