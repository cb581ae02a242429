"""`validate:` the quantized ONNX model against the float model in onnxruntime, on text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import psutil
from tokenizers import Tokenizer

from passes._cores import in_order
from passes._match import behind, constant_value, matmul_weight, producer
from passes._weights import Weight
from passes.fuse_transpose import FuseTranspose
from passes.narrow_embedding import NarrowEmbedding
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, PipelineError
from pipeline.export import load_graph
from pipeline.recipe import Recipe, Validate
from pipeline.scores import score_tokens, summarize
from pipeline.segments import Segments
from pipeline.sessions import accuracy_levels, decoder_feeds, load_model, weight_folder
from pipeline.worst_windows import worst_windows

ELEMENTWISE = {"Mul": np.multiply, "Div": np.divide, "Tanh": np.tanh}
"""What may follow the product that makes logits."""
LOGIT_BYTES = 64 << 20
"""Logits of this many bytes at once: long batches, since two bits dequantize anew on every call."""

SCORED_TOKENS = 64
"""Tokens that one core scores at a time."""
Progress = Callable[[float], None]


def token_windows(recipe: Recipe, checkpoint: Checkpoint) -> np.ndarray:
    """The tokens to validate on, int64 [windows, window].

    Raises:
        CheckpointError: there is no tokenizer.
        PipelineError: there is no such text, or it has fewer tokens than one window.
    """
    options = recipe.validate or Validate()
    ids = np.array(
        known_ids(load_tokenizer(checkpoint).encode(validation_text(options, recipe.folder)).ids, checkpoint), np.int64
    )
    count = min(options.windows, len(ids) // options.window)
    if count == 0:
        raise PipelineError(f"validate: the text has {len(ids)} tokens, less than one window of {options.window}.")
    return ids[: count * options.window].reshape(count, options.window)


def load_tokenizer(checkpoint: Checkpoint) -> Tokenizer:
    """The checkpoint's tokenizer.json, without truncation or padding."""
    path = checkpoint.folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(
            f"{checkpoint.folder}: no tokenizer.json, so no text can be read. Save one with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)."
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise CheckpointError(f"{path}: not a tokenizer that the tokenizers library reads: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def known_ids(ids: list[int], checkpoint: Checkpoint) -> list[int]:
    """Token ids, all of them ones that the model has a row for.

    Raises:
        CheckpointError: tokenizer and model do not belong together.
    """
    rows = checkpoint.config.get("vocab_size")
    if isinstance(rows, int) and max(ids, default=0) >= rows:
        raise CheckpointError(
            f"{checkpoint.folder / 'tokenizer.json'}: makes the token {max(ids)}, the model knows {rows}. They do not belong "
            "together."
        )
    return ids


def validation_text(options: Validate, folder: Path) -> str:
    """The text to validate on: the recipe's file, or what every CPython carries."""
    if options.text is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[key] for key in sorted(topics))
    path = folder / options.text
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PipelineError(f"validate: {path}: cannot be read as UTF-8 text: {error}") from error


def write_reference(graph_file: Path, checkpoint: Checkpoint, windows: np.ndarray, file: Path, progress: Progress) -> None:
    """Run the float model block by block in onnxruntime; writes what its last product multiplies, the final hidden states.

    They are the float model's part of every later validation on the same text, a thousandth of its logits in size.

    Args:
        graph_file: the exported float graph.
        file: gets float32 [windows, tokens, hidden] in numpy's .npy format.
    """
    graph = load_graph(graph_file, checkpoint)
    hidden = _head(graph).hidden
    for lighten in (NarrowEmbedding(), FuseTranspose()):  # the same numbers from less memory, sooner
        lighten.apply(graph)
    batches = _batches(windows, checkpoint)
    found = Segments(graph, weight_folder(graph), hidden.name).run([decoder_feeds(graph, ids) for ids in batches], progress)
    first = next(found)
    states = np.lib.format.open_memmap(file, "w+", np.float32, (*windows.shape, first.shape[-1]))
    start = 0
    for batch in itertools.chain([first], found):
        states[start : start + len(batch)] = batch
        start += len(batch)
    states.flush()


def reference_logits(graph_file: Path, checkpoint: Checkpoint, file: Path, sizes: Iterable[int]) -> Iterator[np.ndarray]:
    """Logits of the float model, float32 [batch, tokens, vocabulary], from the `file` of `write_reference`.

    The product goes by rows of the output table: widened whole, that would be the largest thing in memory.
    """
    head = _head(load_graph(graph_file, checkpoint))
    states = np.load(file, mmap_mode="r")
    start = 0
    for size in sizes:
        hidden = states[start : start + size]
        logits = np.empty((*hidden.shape[:2], head.table.shape[0]), np.float32)
        for row, rows in head.table.chunks():
            logits[..., row : row + len(rows)] = hidden @ rows.astype(np.float32).T
        for function, factor in head.after:
            function(logits, *factor, out=logits)
        start += size
        yield logits


@dataclass(frozen=True)
class _Head:
    """How an exported decoder makes its logits: hidden states times a table [vocabulary, hidden], then what follows.

    Attributes:
        after: numpy's functions and their further operands; Granite divides logits, Gemma 2 caps them by a tanh.
    """

    hidden: gs.Tensor
    table: Weight
    after: list[tuple[np.ufunc, tuple[np.float32, ...]]]


def scaled_logits(graph: gs.Graph) -> bool:
    """Whether a decoder's logits are more than a product with a weight."""
    return bool(_head(graph).after)


def _head(graph: gs.Graph) -> _Head:
    """The head of a graph.

    Raises:
        PipelineError: the logits are made in another way.
    """
    node = producer(next(t for t in graph.outputs if t.name == "logits"))
    after: list[tuple[np.ufunc, tuple[np.float32, ...]]] = []
    while node is not None and node.op in ELEMENTWISE:
        scalars = [value for t in node.inputs[1:] if (value := constant_value(t)) is not None and value.size == 1]
        if len(scalars) != len(node.inputs) - 1:
            break
        after.insert(0, (ELEMENTWISE[node.op], tuple(np.float32(value.reshape(-1)[0]) for value in scalars)))
        node = producer(behind(node.inputs[0]))
    operand = matmul_weight(node) if node is not None and node.op == "MatMul" else None
    if node is None or operand is None:
        raise PipelineError("the logits of the exported graph are not one product with a weight.")
    return _Head(node.inputs[0], operand.weight, after)


def compare(
    graph_file: Path, checkpoint: Checkpoint, reference: Path, candidate: Path, windows: np.ndarray, progress: Progress,
    as_run: bool = True,
) -> dict[str, Any]:  # fmt: skip
    """Both models on `windows`, block by block; the candidate in exact arithmetic and, where it differs, in its own.

    Args:
        graph_file: the exported float graph.
        reference: what `write_reference` wrote for the same windows.
        candidate: the quantized model.onnx.
        as_run: whether the candidate's own arithmetic is of interest.

    Returns:
        The figures of `Quality` and the worst windows at accuracy_level 0, figures at the recipe's level under `as_run`.
    """
    levels = sorted(accuracy_levels(load_model(candidate)) | {0}) if as_run else [0]
    batches = _batches(windows, checkpoint)
    runs = []
    for number, level in enumerate((0, None)[: len(levels)]):
        share = lambda done, number=number: progress((number + done) / len(levels))  # noqa: E731
        runs.append(candidate_logits(candidate, level, batches, share))
    scores: list[list[np.ndarray]] = [[] for _ in runs]
    expected = reference_logits(graph_file, checkpoint, reference, map(len, batches))
    for ids, known, *found in zip(batches, expected, *runs, strict=True):
        for kept, logits in zip(scores, found, strict=True):
            kept.append(score_batch(known, logits, ids))
    exact = np.concatenate(scores[0])
    result: dict[str, Any] = asdict(summarize(exact))
    result["worst_windows"] = worst_windows(exact, windows, load_tokenizer(checkpoint))
    if len(levels) > 1:
        result["as_run"] = {"accuracy_levels": levels[1:], **asdict(summarize(np.concatenate(scores[1])))}
    return result


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


def _batches(windows: np.ndarray, checkpoint: Checkpoint) -> list[np.ndarray]:
    """Windows in batches whose logits take about LOGIT_BYTES."""
    vocabulary = int(checkpoint.config.get("vocab_size", 1 << 17))
    size = max(1, LOGIT_BYTES // (4 * windows.shape[1] * vocabulary))
    return [windows[start : start + size] for start in range(0, len(windows), size)]


def too_large(checkpoint: Checkpoint, copies: int = 1) -> str | None:
    """Why nobody can hold the model's weights in float here, so many times over, or None."""
    need, free = copies * memory_needed(checkpoint), psutil.virtual_memory().available
    if need < free:
        return None
    return f"the weights in float need {need / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"


def memory_needed(checkpoint: Checkpoint) -> int:
    """Bytes of all weights in float32, and half as much again while they are made."""
    return 6 * sum(int(np.prod(w.shape)) for w in checkpoint.weights.values())
