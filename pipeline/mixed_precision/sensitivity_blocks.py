"""A float model in torch, one decoder block in memory -> what its linear layers read, for metrics that look at it."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import torch
from threadpoolctl import threadpool_limits

from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.parallel import in_order
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.mixed_precision.layer_trace import LayerTrace, recording
from lowbit.pipeline.mixed_precision.sensitivity import Layer, LayerChoice, SensitivityMetric
from lowbit.pipeline.runtime.torch_decoder import TorchDecoder
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.validate.head import scaled_logits

HEAD = "lm_head"
Measured = Iterator[tuple[Layer, BlockFormat, float]]
Floats = npt.NDArray[np.float32]
Scores = npt.NDArray[np.float64]
Score = Callable[[Floats, slice, Floats], Scores]
"""Of some rows of a weight: `x (W' - W)^T`, which rows these are, and W."""


class BlockwiseMetric(SensitivityMetric):
    """Common to both metrics that go block by block: the float model in torch, and the inputs of its layers.

    Args:
        graph: the float graph whose weights are those of the model.
        windows: token ids int64 [windows, tokens].
        model: digest of the model and of the passes that were applied to it.
    """

    word: str
    """What recipes call it."""

    def __init__(
        self, graph: gs.Graph, checkpoint: Checkpoint, layers: list[Layer], method: Method, windows: npt.NDArray[np.int64],
        model: str, store: Store,
    ) -> None:  # fmt: skip
        super().__init__(layers, method, digest(model, windows.tolist(), versions(("torch", "transformers"))), store)
        self.graph, self.checkpoint, self.ids = graph, checkpoint, torch.from_numpy(windows)

    def run(self, choices: list[LayerChoice]) -> Measured:
        """The sensitivity of each choice, block by block."""
        self.decoder = TorchDecoder.of_graph(self.checkpoint, self.graph)
        self._check_model()
        self.by_name = {layer.name: layer for layer in self.layers}
        self.forms: dict[str, list[BlockFormat]] = defaultdict(list)
        for layer, form in choices:
            self.forms[layer.name].append(form)
        measured = set()
        with self.store.scratch() as self.scratch:
            for layer, form, value in self.blocks():
                measured.add(layer.name)
                yield layer, form, value
        # an expert that no token of the text went to
        yield from ((layer, form, 0.0) for layer, form in choices if layer.name not in measured)

    def _check_model(self) -> None:
        linear = {name for name, module in self.decoder.skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
        if other := [layer.name for layer in self.layers if layer.name not in linear]:
            raise PipelineError(f"sensitivity: {self.word} looks at transformers' own layers; {other[0]} is none. Set kl.")
        if scaled_logits(self.graph):
            raise PipelineError(
                f"sensitivity: {self.word} needs logits that are a plain product; here they are scaled. Set kl."
            )

    @abstractmethod
    def blocks(self) -> Measured:
        """Go through the model and yield the sensitivity of each choice."""

    def states(self) -> Iterator[tuple[int, Any, torch.Tensor]]:
        """Number of each block, the block, and the hidden states before it, float32 [windows, tokens, hidden].

        Last come the number of blocks, None, and the hidden states after all of them.
        """
        hidden = self.decoder.embed(self.ids)
        for number in range(self.decoder.config.num_hidden_layers):
            block = self.decoder.block(number)
            yield number, block, hidden
            with torch.no_grad():
                hidden = torch.cat([self.decoder.run(block, part) for part in torch.split(hidden, 1)])
        yield self.decoder.config.num_hidden_layers, None, hidden

    def watch(
        self, block: Any, number: int, hidden: torch.Tensor, back: torch.Tensor
    ) -> tuple[dict[str, LayerTrace], torch.Tensor]:
        """What the layers of a block read on hidden states, and the gradients before it.

        Args:
            hidden: [windows, tokens, hidden].
            back: gradients behind the block, [samples, windows, tokens, hidden]; there may be no samples.
        """
        prefix = f"model.layers.{number}."
        names = {name.removeprefix(prefix): name for name in self.forms if name.startswith(prefix)}
        before = torch.empty_like(back)
        traces: dict[str, LayerTrace] = {}
        for window, x in enumerate(torch.split(hidden, 1)):
            x = x.clone().requires_grad_(len(back) > 0)
            with recording(block, list(names)) as records:
                y = self.decoder.run(block, x)
            wanted = [x, *(output for _, output in records.values())]
            gradients: list[tuple[torch.Tensor, ...]] = []  # by sample, then by layer
            for sample, ahead in enumerate(back[:, window : window + 1]):
                at_x, *at_outputs = torch.autograd.grad(y, wanted, ahead, retain_graph=True, materialize_grads=True)
                before[sample, window] = at_x[0]
                gradients.append(tuple(at_outputs))
            for i, (name, (layer_input, _)) in enumerate(records.items()):
                if (trace := traces.get(names[name])) is None:
                    shape = self.by_name[names[name]].weight.shape
                    trace = traces[names[name]] = LayerTrace(self.scratch, self.ids.numel(), shape, len(back))
                trace.add(window, layer_input, [of_layers[i] for of_layers in gradients])
        for trace in traces.values():
            trace.close()
        return traces, before

    def head_input(self, hidden: torch.Tensor) -> Floats:
        """What the last product multiplies, float32 [tokens, hidden]."""
        with torch.no_grad():
            return self.decoder.norm()(hidden).reshape(-1, hidden.shape[-1]).numpy()

    def score(self, name: str, x: Floats, score: Score) -> Iterator[tuple[BlockFormat, Scores]]:
        """For each form that is asked for the sum of `score` over the rows of a layer's weight."""
        for form in self.forms[name]:
            with threadpool_limits(1, "blas"):
                total = sum(in_order(partial(self._score_rows, form, x, score), self.by_name[name].weight.chunks()))
            yield form, np.asarray(total)

    def _score_rows(self, form: BlockFormat, x: Floats, score: Score, chunk: tuple[int, npt.NDArray]) -> Scores:
        start, rows = chunk
        exact = rows.astype(np.float32)
        away = self.method.quantize(rows, form).dequantize(rows.shape[1]) - exact
        return score(x @ away.T, slice(start, start + len(rows)), exact)
