"""The float model's hidden states and logits on windows of text."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lowbit.passes.lowering.fuse_transpose import FuseTranspose
from lowbit.passes.narrow_embedding import NarrowEmbedding
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.runtime.layerwise import LayerwiseModel
from lowbit.pipeline.runtime.session import decoder_feeds, weight_folder
from lowbit.pipeline.validate.head import head_of

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
    hidden = head_of(graph).hidden
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
    """Logits of the float model, float32 [batch, tokens, vocabulary], from the `file` of `write_reference`."""
    states, start = np.load(file, mmap_mode="r"), 0
    product = head_of(load_graph(graph_file, checkpoint)).product()
    for size in sizes:
        yield product(states[start : start + size])
        start += size


def batches(windows: npt.NDArray[np.int64], checkpoint: Checkpoint) -> list[npt.NDArray[np.int64]]:
    """Windows in batches whose logits take about LOGIT_BYTES."""
    vocabulary = int(checkpoint.config.get("vocab_size", 1 << 17))
    size = max(1, LOGIT_BYTES // (4 * windows.shape[1] * vocabulary))
    return [windows[start : start + size] for start in range(0, len(windows), size)]
