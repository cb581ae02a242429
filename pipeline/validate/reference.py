"""The float model's hidden states and logits on windows of text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from lowbit.passes.graph.match import behind, constant_value, matmul_weight, producer
from lowbit.passes.lowering.fuse_transpose import FuseTranspose
from lowbit.passes.narrow_embedding import NarrowEmbedding
from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.runtime.layerwise import LayerwiseModel
from lowbit.pipeline.runtime.session import decoder_feeds, weight_folder

ELEMENTWISE = {"Mul": np.multiply, "Div": np.divide, "Tanh": np.tanh}
"""What may follow the product that makes logits."""
LOGIT_BYTES = 64 << 20
"""Logits of this many bytes at once: long batches, since two bits dequantize anew on every call."""
Progress = Callable[[float], None]


def write_reference(
    graph_file: Path, checkpoint: Checkpoint, windows: npt.NDArray[np.int64], file: Path, progress: Progress
) -> None:
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
    parts = batches(windows, checkpoint)
    made = LayerwiseModel(graph, weight_folder(graph), hidden.name).run([decoder_feeds(graph, ids) for ids in parts], progress)
    first = next(made)
    states = np.lib.format.open_memmap(file, "w+", np.float32, (*windows.shape, first.shape[-1]))
    start = 0
    for batch in itertools.chain([first], made):
        states[start : start + len(batch)] = batch
        start += len(batch)
    states.flush()


def reference_logits(
    graph_file: Path, checkpoint: Checkpoint, file: Path, sizes: Iterable[int]
) -> Iterator[npt.NDArray[np.float32]]:
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


def batches(windows: npt.NDArray[np.int64], checkpoint: Checkpoint) -> list[npt.NDArray[np.int64]]:
    """Windows in batches whose logits take about LOGIT_BYTES."""
    vocabulary = int(checkpoint.config.get("vocab_size", 1 << 17))
    size = max(1, LOGIT_BYTES // (4 * windows.shape[1] * vocabulary))
    return [windows[start : start + size] for start in range(0, len(windows), size)]
