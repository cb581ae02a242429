"""Train what `finetune_blocks` marked: one decoder block after the other, then the whole model, in torch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from torch.nn import functional

from lowbit.passes.finetune_blocks import FinetuneBlocks
from lowbit.passes.graph.names import LAYER
from lowbit.passes.quant.format import Blocks
from lowbit.passes.quant.quantized_weight import Chunk, QuantizedWeight
from lowbit.pipeline.calibrate.fake_quant_linear import TrainedLinear
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.onnx_io.reader import stored_as_entry
from lowbit.pipeline.onnx_io.stream import write_chunks
from lowbit.pipeline.runtime.memory import too_large
from lowbit.pipeline.runtime.torch_decoder import TorchDecoder
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.store.store import Entry, Store

LIBRARIES = ("torch", "transformers")
BETAS = (0.9, 0.99)
"""Adam's: gradients of rounding change fast, so their squares are forgotten sooner than usual."""
WARM_UP, LAST = 0.05, 0.05
"""Share of the steps in which the learning rate rises, and what share of it a cosine leaves at the end."""
Report = Callable[[float, str], None]


def finetune(
    graph: gs.Graph,
    checkpoint: Checkpoint,
    windows: np.ndarray,
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
    options = next(w.training for w in entries if w.training is not None)
    assert isinstance(options, FinetuneBlocks)
    if options.end_to_end and (reason := too_large(checkpoint, copies=3)) is not None:
        raise PipelineError(f"finetune_blocks: end_to_end trains the whole model at once, and {reason}. Set it to 0.")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads)
    try:
        return _Training(graph, checkpoint, torch.from_numpy(windows), options, dict(entries), store, report).run()
    finally:
        torch.set_num_threads(threads)


class _Training:
    def __init__(
        self, graph: gs.Graph, checkpoint: Checkpoint, windows: torch.Tensor, options: FinetuneBlocks,
        entries: dict[QuantizedWeight, Entry], store: Store, report: Report,
    ) -> None:  # fmt: skip
        self.decoder = TorchDecoder.of_graph(checkpoint, graph)
        self.windows, self.options, self.entries, self.store, self.report = windows, options, entries, store, report
        self.layers: dict[int, list[QuantizedWeight]] = {}
        for weight in entries:
            if found := LAYER.search(weight.name):
                self.layers.setdefault(int(found.group(1)), []).append(weight)
        self.chain = digest(
            "finetune", options.model_dump(mode="json"), windows.tolist(), sorted(e.folder.name for e in entries.values()),
            source_digest(finetune), versions(LIBRARIES),
        )  # fmt: skip
        self.begun = time.monotonic()

    def run(self) -> dict[QuantizedWeight, Entry]:
        exact = self.decoder.embed(self.windows)
        quantized = exact.clone()
        total = len(self.layers) + 2 * self.options.end_to_end
        for number in sorted(self.layers) if self.options.epochs else ():
            block = self.decoder.block(number)
            target = self._through(block, exact)
            trained = self._insert(block, self.layers[number], f"model.layers.{number}.")
            if not self._recall(trained, "block"):
                self._train_block(block, trained, quantized, target, partial(self._share, number / total, 1 / total))
                self._keep(trained, "block")
            quantized, exact = self._through(block, quantized), target
        if self.options.end_to_end:
            self._end_to_end(partial(self._share, len(self.layers) / total, 1 - len(self.layers) / total))
        return self.entries

    def _end_to_end(self, share: Callable[[float], None]) -> None:
        student = self.decoder.whole()
        trained = self._insert(student, list(self.entries), "")
        if self._recall(trained, "end to end"):
            return
        teacher = self.decoder.whole()

        def loss(rows: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                expected = torch.log_softmax(teacher(self.windows[rows], use_cache=False).logits, -1)
            found = torch.log_softmax(student(self.windows[rows], use_cache=False).logits, -1)
            return functional.kl_div(found, expected, reduction="batchmean", log_target=True) / self.windows.shape[1]

        self._train(trained, loss, self.options.end_to_end, share)
        self._keep(trained, "end to end")

    def _train_block(
        self, block: Any, trained: dict[QuantizedWeight, TrainedLinear], x: torch.Tensor, target: torch.Tensor,
        share: Callable[[float], None],
    ) -> None:  # fmt: skip
        size = target.square().mean()

        def loss(rows: torch.Tensor) -> torch.Tensor:
            return (self.decoder.run(block, x[rows]) - target[rows]).square().mean() / size

        self._train(trained, loss, self.options.epochs, share)

    def _train(
        self,
        trained: dict[QuantizedWeight, TrainedLinear],
        loss: Callable[[torch.Tensor], torch.Tensor],
        epochs: int,
        share: Callable[[float], None],
    ) -> None:
        options, count = self.options, len(self.windows)
        groups = (
            {"params": [linear.latent for linear in trained.values()], "lr": options.learning_rate},
            {"params": [p for linear in trained.values() for p in linear.grid], "lr": options.scale_learning_rate},
        )
        adam = options.optimizer == "adam"
        optimizer = torch.optim.Adam(groups, betas=BETAS) if adam else torch.optim.SGD(groups)
        steps = epochs * -(-count // options.batch)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step / steps) if adam else 1 - step / steps)
        shuffled = torch.Generator().manual_seed(options.seed)
        for step in range(steps):
            if step % -(-count // options.batch) == 0:
                batches = iter(torch.split(torch.randperm(count, generator=shuffled), options.batch))
            optimizer.zero_grad()
            torch.autograd.backward(loss(next(batches)))
            if not adam:
                for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                    parameter.grad.sign_()
            optimizer.step()
            schedule.step()
            share((step + 1) / steps)

    def _through(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([self.decoder.run(block, part) for part in torch.split(x, self.options.batch)])

    def _insert(self, module: Any, weights: list[QuantizedWeight], prefix: str) -> dict[QuantizedWeight, TrainedLinear]:
        """Put the codes of the entries in place of float weights; returns those that are to be trained."""
        trained = {}
        for weight in weights:
            linear = TrainedLinear(weight, self._blocks(weight), module.get_submodule(weight.name.removeprefix(prefix)))
            parent, _, leaf = weight.name.removeprefix(prefix).rpartition(".")
            setattr(module.get_submodule(parent), leaf, linear)
            if weight.training is not None:
                trained[weight] = linear
            else:
                linear.requires_grad_(False)
        return trained

    def _blocks(self, weight: QuantizedWeight) -> Blocks:
        layer = stored_as_entry(weight, self.entries[weight].folder)
        parts = [layer.block_rows(*rows) for rows in layer.row_ranges()]
        return Blocks(*(np.concatenate([getattr(p, name) for p in parts]) for name in ("codes", "scales", "zero_points")))

    def _key(self, weight: QuantizedWeight, phase: str) -> str:
        return digest(self.chain, phase, weight.name)

    def _recall(self, trained: dict[QuantizedWeight, TrainedLinear], phase: str) -> bool:
        """Take over what was trained before, if it is all there."""
        found = {weight: self.store.get(self._key(weight, phase)) for weight in trained}
        known = {weight: entry for weight, entry in found.items() if entry is not None}
        if len(known) < len(trained):
            return False
        self.entries |= known
        for weight, linear in trained.items():
            linear.settle(self._blocks(weight))
        return True

    def _keep(self, trained: dict[QuantizedWeight, TrainedLinear], phase: str) -> None:
        for weight, linear in trained.items():
            blocks = linear.blocks()
            linear.settle(blocks)
            self.entries[weight] = self.store.put(
                self._key(weight, phase), lambda folder, w=weight, b=blocks: write_chunks(w, _chunks(w, b), folder)  # type: ignore[misc]
            )  # fmt: skip

    def _share(self, start: float, part: float, done: float) -> None:
        done = start + part * done
        self.report(done, f"{(time.monotonic() - self.begun) * (1 - done) / done:,.0f} s left")


def _rate(done: float) -> float:
    return done / WARM_UP if done < WARM_UP else LAST + (1 - LAST) * (1 + math.cos(math.pi * done)) / 2


def _chunks(weight: QuantizedWeight, blocks: Blocks) -> Iterator[Chunk]:
    for start, rows in weight.source.chunks():
        here = slice(start, start + len(rows))
        yield weight.chunk(start, rows, Blocks(blocks.codes[here], blocks.scales[here], blocks.zero_points[here]))
