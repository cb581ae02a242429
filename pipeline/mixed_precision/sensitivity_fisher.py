"""`sensitivity: output_mse` and `fisher`: what layers' outputs lose, one decoder block of the float model in memory."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from threadpoolctl import threadpool_limits

from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.mixed_precision.sensitivity import Choice, Layer, Sensitivity
from lowbit.pipeline.runtime.torch_decoder import TorchDecoder
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.scratch import room
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.validate.reference import scaled_logits

SAMPLES = 4
"""Texts that the model might have written instead, sampled token by token, for each window."""
SCORED_TOKENS = 64
"""Tokens whose probabilities are looked at together."""
HEAD = "lm_head"
Found = Iterator[tuple[Layer, BlockFormat, float]]


class Seen:
    """What a linear layer saw, window by window; large arrays lie on the disk.

    Attributes:
        x: inputs, float32 [tokens, K].
        windows: number of the window of each token, int64 [tokens].
        gradients: of the log-likelihood of sampled texts by the layer's outputs, float32 [samples, tokens, N].
    """

    def __init__(self, scratch: Path, tokens: int, shape: tuple[int, ...], samples: int) -> None:
        n, k = shape
        self.x, self.windows = room(scratch, (tokens, k)), np.empty(tokens, np.int64)
        self.gradients = room(scratch, (samples, tokens, n))
        self.count = 0

    def add(self, window: int, x: torch.Tensor, gradients: list[torch.Tensor]) -> None:
        """Count a window in; an expert sees some of its tokens, or none."""
        rows = x.detach().reshape(-1, x.shape[-1]).numpy()
        here = slice(self.count, self.count + len(rows))
        self.x[here], self.windows[here] = rows, window
        for sample, gradient in enumerate(gradients):
            self.gradients[sample, here] = gradient.reshape(-1, gradient.shape[-1]).numpy()
        self.count += len(rows)

    def close(self) -> None:
        """Forget the room that was not needed."""
        self.x, self.windows, self.gradients = self.x[: self.count], self.windows[: self.count], self.gradients[:, : self.count]


class BlockDamage(Sensitivity):
    """Common to both: the float model in torch, block by block, and the layers' inputs in it.

    Args:
        graph: the float graph whose weights are those of the model.
        windows: token ids int64 [windows, tokens].
        model: digest of the model and of the passes that were applied to it.
    """

    word: str
    """What recipes call it."""

    def __init__(
        self, graph: gs.Graph, checkpoint: Checkpoint, layers: list[Layer], method: Method, windows: np.ndarray, model: str,
        store: Store,
    ) -> None:  # fmt: skip
        known = versions(("torch", "transformers"))
        super().__init__(layers, method, digest(model, windows.tolist(), SAMPLES, known), store)
        self.graph, self.checkpoint, self.ids = graph, checkpoint, torch.from_numpy(windows)

    def run(self, choices: list[Choice]) -> Found:
        self.decoder = TorchDecoder.of_graph(self.checkpoint, self.graph)
        linear = {name for name, module in self.decoder.skeleton.named_modules() if isinstance(module, torch.nn.Linear)}
        if other := [layer.name for layer in self.layers if layer.name not in linear]:
            raise PipelineError(f"sensitivity: {self.word} looks at transformers' own layers; {other[0]} is none. Set kl.")
        if scaled_logits(self.graph):
            raise PipelineError(
                f"sensitivity: {self.word} needs logits that are a plain product; here they are scaled. Set kl."
            )
        forms: dict[str, list[BlockFormat]] = defaultdict(list)
        for layer, form in choices:
            forms[layer.name].append(form)
        self.forms, self.by_name = forms, {layer.name: layer for layer in self.layers}
        with self.store.scratch() as scratch:
            self.scratch = scratch
            seen = set()
            for found in self.blocks():
                seen.add(found[0].name)
                yield found
        # an expert that no token of the text went to
        yield from ((layer, form, 0.0) for layer, form in choices if layer.name not in seen)

    @abstractmethod
    def blocks(self) -> Found:
        """Go through the model and yield what is asked for."""

    def states(self) -> Iterator[tuple[int, Any, torch.Tensor]]:
        """Number of each block, the block, and the hidden states before it, float32 [windows, tokens, hidden]."""
        hidden = self.decoder.embed(self.ids)
        for number in range(self.decoder.config.num_hidden_layers):
            block = self.decoder.block(number)
            yield number, block, hidden
            with torch.no_grad():
                hidden = torch.cat([self.decoder.run(block, part) for part in torch.split(hidden, 1)])
        yield self.decoder.config.num_hidden_layers, None, hidden

    def watch(self, block: Any, number: int, hidden: torch.Tensor, back: torch.Tensor | None) -> tuple[dict[str, Seen], Any]:
        """What the layers of a block see on hidden states, and the gradients before it.

        Args:
            hidden: [windows, tokens, hidden].
            back: gradients behind the block, [samples, windows, tokens, hidden].
        """
        prefix = f"model.layers.{number}."
        wanted = {name.removeprefix(prefix): name for name in self.forms if name.startswith(prefix)}
        before = None if back is None else torch.empty_like(back)
        found: dict[str, Seen] = {}
        for window, x in enumerate(torch.split(hidden, 1)):
            x = x.clone().requires_grad_(back is not None)
            with _watching(block, list(wanted)) as seen:
                y = self.decoder.run(block, x)
            gradients: dict[str, list[torch.Tensor]] = defaultdict(list)
            for sample in range(0 if back is None else len(back)):
                assert back is not None and before is not None  # noqa: PT018
                ends = [out for _, out in seen.values()]
                ahead = back[sample, window : window + 1]
                pulled = torch.autograd.grad(y, [x, *ends], ahead, retain_graph=True, materialize_grads=True)
                before[sample, window] = pulled[0][0]
                for name, gradient in zip(seen, pulled[1:], strict=True):
                    gradients[name].append(gradient)
            for name, (given, _) in seen.items():
                whole = wanted[name]
                if whole not in found:
                    shape, samples = self.by_name[whole].weight.shape, 0 if back is None else len(back)
                    found[whole] = Seen(self.scratch, self.ids.numel(), shape, samples)
                found[whole].add(window, given, gradients[name])
        for one in found.values():
            one.close()
        return found, before

    def head(self, hidden: torch.Tensor) -> np.ndarray:
        """What the last product multiplies, float32 [tokens, hidden]."""
        with torch.no_grad():
            return self.decoder.norm()(hidden).reshape(-1, hidden.shape[-1]).numpy()

    def each(
        self, name: str, score: Callable[[np.ndarray, slice, np.ndarray], np.ndarray], x: np.ndarray
    ) -> Iterator[tuple[BlockFormat, np.ndarray]]:
        """For each form that is asked for the sum of `score(x (W' - W)^T, rows, W)` over rows of the weight."""
        layer = self.by_name[name]
        k = layer.weight.shape[1]
        for form in self.forms[name]:

            def one(piece: tuple[int, np.ndarray], form: BlockFormat = form) -> np.ndarray:
                rows = piece[1].astype(np.float32)
                away = self.method.quantize(piece[1], form).dequantize(k) - rows
                return score(x @ away.T, slice(piece[0], piece[0] + len(rows)), rows)

            with threadpool_limits(1, "blas"):
                found = sum(in_order(one, layer.weight.chunks()))
            yield form, np.asarray(found)


class OutputError(BlockDamage):
    """Relative squared error of the layer's outputs, |X (W' - W)^T|^2 / |X W^T|^2, X what the float model gives it."""

    word = "output_mse"

    def blocks(self) -> Found:
        for number, block, hidden in self.states():
            if block is None:
                yield from self._errors({HEAD: self.head(hidden)} if HEAD in self.forms else {})
                return
            with torch.no_grad():
                seen, _ = self.watch(block, number, hidden, None)
            yield from self._errors({name: one.x for name, one in seen.items()})

    def _errors(self, inputs: dict[str, np.ndarray]) -> Found:
        for name, x in inputs.items():

            def squares(away: np.ndarray, _: slice, rows: np.ndarray, x: np.ndarray = x) -> np.ndarray:
                return np.array([np.square(away, dtype=np.float64).sum(), np.square(x @ rows.T, dtype=np.float64).sum()])

            for form, (error, total) in self.each(name, squares, x):
                yield self.by_name[name], form, float(error / max(total, np.finfo(np.float64).tiny))


class Fisher(BlockDamage):
    """The KL divergence of the output to second order, 1/2 d^T F d for d = W' - W, in nats per token.

    F is the Fisher information, the mean of g g^T over texts that the model itself would write, g the gradient of their
    log-likelihood by the weight (Amari, doi:10.1162/089976698300017746, eq. 3.4; Martens, arXiv:1412.1193, section 6):
    F d is not formed, the sum over a window's tokens of g_t . (d x_t) is, and squared. For the output layer the mean over
    texts is known: half the variance of the logits' change under the model's own probabilities.
    """

    word = "fisher"

    def blocks(self) -> Found:
        kept: list[torch.Tensor] = []
        for _, block, hidden in self.states():
            kept.append(self._keep(hidden))
            del block
        back, probabilities = self._head_gradients(kept[-1])
        if HEAD in self.forms:
            yield from self._head_damage(kept[-1], probabilities)
        del probabilities
        for number in reversed(range(self.decoder.config.num_hidden_layers)):
            seen, back = self.watch(self.decoder.block(number), number, kept[number], back)
            for name, one in seen.items():
                yield from self._damage(name, one)
            kept.pop()

    def _keep(self, values: torch.Tensor) -> torch.Tensor:
        place = room(self.scratch, tuple(values.shape))
        place[...] = values.numpy()
        return torch.from_numpy(place)

    def _damage(self, name: str, seen: Seen) -> Found:
        def along(away: np.ndarray, rows: slice, _: np.ndarray) -> np.ndarray:
            return np.einsum("stn,tn->st", seen.gradients[:, :, rows], away).astype(np.float64)

        for form, moved in self.each(name, along, seen.x):
            by_window = np.stack([np.bincount(seen.windows, one, len(self.ids)) for one in moved])
            yield self.by_name[name], form, float(np.square(by_window).mean() / 2 / self.ids.shape[1])

    def _head_damage(self, hidden: torch.Tensor, probabilities: np.ndarray) -> Found:
        def moments(away: np.ndarray, rows: slice, _: np.ndarray) -> np.ndarray:
            weighted = probabilities[:, rows] * away
            return np.stack([weighted.sum(1, dtype=np.float64), np.einsum("tn,tn->t", weighted, away).astype(np.float64)])

        for form, (mean, square) in self.each(HEAD, moments, self.head(hidden)):
            yield self.by_name[HEAD], form, float((square - mean**2).mean() / 2)

    def _head_gradients(self, hidden: torch.Tensor) -> tuple[torch.Tensor, np.ndarray]:
        """Gradients of sampled tokens' log-likelihood before the last norm [samples, windows, tokens, hidden], and the
        model's probabilities [all tokens, vocabulary]."""
        table, x = self.decoder.head_weight, self.head(hidden)
        probabilities = room(self.scratch, (len(x), table.shape[0]))
        for start, rows in table.chunks():
            probabilities[:, start : start + len(rows)] = x @ rows.astype(np.float32).T
        chosen = np.empty((SAMPLES, len(x)), np.int64)
        dice = torch.Generator().manual_seed(0)
        for start in range(0, len(x), SCORED_TOKENS):
            part = torch.from_numpy(probabilities[start : start + SCORED_TOKENS]).softmax(-1)
            probabilities[start : start + SCORED_TOKENS] = part.numpy()
            chosen[:, start : start + SCORED_TOKENS] = torch.multinomial(part, SAMPLES, True, generator=dice).T.numpy()
        pulled = _rows_of(table, chosen)
        for start, rows in table.chunks():
            pulled -= (probabilities[:, start : start + len(rows)] @ rows.astype(np.float32))[None]
        back = torch.from_numpy(pulled).reshape(SAMPLES, *hidden.shape)
        norm, before = self.decoder.norm(), torch.empty_like(back)
        given = hidden.clone().requires_grad_(True)
        normed = norm(given)
        for sample in range(SAMPLES):
            (before[sample],) = torch.autograd.grad(normed, given, back[sample], retain_graph=True)
        return before, probabilities


def _rows_of(table: Weight, numbers: np.ndarray) -> np.ndarray:
    """Rows of a table by number, float32 [*numbers.shape, K], each read once."""
    found = {int(i): table.rows(int(i), int(i) + 1)[0].astype(np.float32) for i in np.unique(numbers)}
    return np.stack([found[int(i)] for i in numbers.reshape(-1)]).reshape(*numbers.shape, -1)


@contextmanager
def _watching(block: Any, names: list[str]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Input and output of the linear layers of a block that are called `names`, as they are run."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> Callable[[Any, Any, torch.Tensor], None]:
        def keep(_: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            seen[name] = given[0], output

        return keep

    handles = [block.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
