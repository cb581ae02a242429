"""Quantized weights that `finetune_blocks` marked -> trained ones: one decoder block after the other, then the whole model."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import torch
from torch.nn import functional

from lowbit.passes.finetune_blocks import FinetuneBlocks
from lowbit.passes.graph.names import LAYER
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.calibrate.trained_entries import Trained, TrainedEntries
from lowbit.pipeline.calibrate.training import train
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.runtime.memory import too_large
from lowbit.pipeline.runtime.torch_decoder import TorchDecoder
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.store.store import Entry, Store

LIBRARIES = ("torch", "transformers")
Report = Callable[[float, str], None]


def finetune(
    graph: gs.Graph,
    checkpoint: Checkpoint,
    windows: npt.NDArray[np.int64],
    entries: dict[QuantizedWeight, Entry],
    store: Store,
    report: Report,
) -> dict[QuantizedWeight, Entry]:
    """Train the marked weights of `graph`, starting from `entries`, or recall what was trained before.

    Args:
        windows: int64 [windows, tokens], what both models read.
        entries: of every quantized MatMul, marked or not.
        report: gets the share done and the time left.

    Returns:
        `entries`, those of marked weights replaced.

    Raises:
        PipelineError: end-to-end training does not fit into memory.
    """
    options = next(weight.training for weight in entries if isinstance(weight.training, FinetuneBlocks))
    if options.end_to_end and (reason := too_large(checkpoint, copies=3)) is not None:
        raise PipelineError(f"finetune_blocks: end_to_end trains the whole model at once, and {reason}. Set it to 0.")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _Finetuning(graph, checkpoint, torch.from_numpy(windows), options, entries, store, report).run()
    finally:
        torch.set_num_threads(threads)


class _Finetuning:
    """The float model and the quantized one, on their way through the blocks."""

    def __init__(
        self, graph: gs.Graph, checkpoint: Checkpoint, windows: torch.Tensor, options: FinetuneBlocks,
        entries: dict[QuantizedWeight, Entry], store: Store, report: Report,
    ) -> None:  # fmt: skip
        self.decoder = TorchDecoder.of_graph(checkpoint, graph)
        self.windows, self.options, self.report = windows, options, report
        self.layers: dict[int, list[QuantizedWeight]] = {}
        for weight in entries:
            if layer := LAYER.search(weight.name):
                self.layers.setdefault(int(layer.group(1)), []).append(weight)
        chain = digest(
            "finetune", options.model_dump(mode="json"), windows.tolist(), sorted(e.folder.name for e in entries.values()),
            source_digest(finetune), versions(LIBRARIES),
        )  # fmt: skip
        self.trained = TrainedEntries(entries, chain, store)
        self.begun = time.monotonic()

    def run(self) -> dict[QuantizedWeight, Entry]:
        parts = len(self.layers) + 2 * self.options.end_to_end
        if self.options.epochs:
            self._blocks_in_turn(parts)
        if self.options.end_to_end:
            self._end_to_end(partial(self._report, len(self.layers) / parts, 1 - len(self.layers) / parts))
        return self.trained.entries

    def _blocks_in_turn(self, parts: int) -> None:
        """Train each block to write what the float model writes, for what the trained blocks before it write."""
        exact = self.decoder.embed(self.windows)
        quantized = exact.clone()
        for number in sorted(self.layers):
            block = self.decoder.block(number)
            target = self._through(block, exact)
            trained = self.trained.insert(block, self.layers[number], f"model.layers.{number}.")
            if not self.trained.recall(trained, "block"):
                self._train(
                    trained,
                    partial(self._block_loss, block, quantized, target, target.square().mean()),
                    self.options.epochs,
                    partial(self._report, number / parts, 1 / parts),
                )
                self.trained.keep(trained, "block")
            quantized, exact = self._through(block, quantized), target

    def _end_to_end(self, progress: Callable[[float], None]) -> None:
        """Train all weights together to give the float model's probabilities."""
        student = self.decoder.whole()
        trained = self.trained.insert(student, list(self.trained.entries), "")
        if self.trained.recall(trained, "end to end"):
            return
        loss = partial(self._divergence, self.decoder.whole(), student)
        self._train(trained, loss, self.options.end_to_end, progress)
        self.trained.keep(trained, "end to end")

    def _block_loss(
        self, block: Any, x: torch.Tensor, target: torch.Tensor, size: torch.Tensor, batch: torch.Tensor
    ) -> torch.Tensor:
        return (self.decoder.run(block, x[batch]) - target[batch]).square().mean() / size

    def _divergence(self, teacher: Any, student: Any, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            expected = torch.log_softmax(teacher(self.windows[batch], use_cache=False).logits, -1)
        predicted = torch.log_softmax(student(self.windows[batch], use_cache=False).logits, -1)
        return functional.kl_div(predicted, expected, reduction="batchmean", log_target=True) / self.windows.shape[1]

    def _train(
        self, trained: Trained, loss: Callable[[torch.Tensor], torch.Tensor], epochs: int, progress: Callable[[float], None]
    ) -> None:
        train(trained.values(), loss, len(self.windows), epochs, self.options, progress)

    def _through(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([self.decoder.run(block, part) for part in torch.split(x, self.options.batch)])

    def _report(self, start: float, share: float, done: float) -> None:
        done = start + share * done
        self.report(done, f"{(time.monotonic() - self.begun) * (1 - done) / done:,.0f} s left")
