"""`sensitivity: fisher`: gradients of texts that the model would write -> what a quantized weight adds to its divergence."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.mixed_precision.layer_trace import LayerTrace
from lowbit.pipeline.mixed_precision.sensitivity_blocks import HEAD, BlockwiseMetric, Floats, Measured
from lowbit.pipeline.store.scratch import scratch_array

SAMPLES = 4
"""Texts that the model might have written instead, sampled token by token, for each window."""
SCORED_TOKENS = 64
"""Tokens whose probabilities are looked at together."""


class Fisher(BlockwiseMetric):
    """The KL divergence of the output to second order, 1/2 d^T F d for d = W' - W, in nats per token.

    F is the Fisher information, the mean of g g^T over texts that the model itself would write, g the gradient of their
    log-likelihood by the weight (Amari, doi:10.1162/089976698300017746, eq. 3.4; Martens, arXiv:1412.1193, section 6):
    F d is not formed, the sum over a window's tokens of g_t . (d x_t) is, and squared. For the output layer the mean over
    texts is known: half the variance of the logits' change under the model's own probabilities.
    """

    word = "fisher"

    def blocks(self) -> Measured:
        """The output layer, then layers from the last block to the first."""
        states: list[torch.Tensor] = []
        for _, block, hidden in self.states():
            states.append(self._to_scratch(hidden))
            del block
        probabilities = self._probabilities(self.head_input(states[-1]))
        back = self._gradients(states[-1], probabilities)
        if HEAD in self.forms:
            yield from self._head_sensitivity(states[-1], probabilities)
        del probabilities
        for number in reversed(range(self.decoder.config.num_hidden_layers)):
            traces, back = self.watch(self.decoder.block(number), number, states[number], back)
            for name, trace in traces.items():
                yield from self._sensitivity(name, trace)
            states.pop()

    def _to_scratch(self, values: torch.Tensor) -> torch.Tensor:
        array = scratch_array(self.scratch, tuple(values.shape))
        array[...] = values.numpy()
        return torch.from_numpy(array)

    def _sensitivity(self, name: str, trace: LayerTrace) -> Measured:
        def along_gradients(away: Floats, rows: slice, _: Floats) -> npt.NDArray[np.float64]:
            return np.einsum("stn,tn->st", trace.gradients[:, :, rows], away).astype(np.float64)

        for form, moves in self.score(name, trace.x, along_gradients):
            by_window = np.stack([np.bincount(trace.windows, move, len(self.ids)) for move in moves])
            yield self.by_name[name], form, float(np.square(by_window).mean() / 2 / self.ids.shape[1])

    def _head_sensitivity(self, hidden: torch.Tensor, probabilities: Floats) -> Measured:
        def moments(away: Floats, rows: slice, _: Floats) -> npt.NDArray[np.float64]:
            weighted = probabilities[:, rows] * away
            return np.stack([weighted.sum(1, dtype=np.float64), np.einsum("tn,tn->t", weighted, away).astype(np.float64)])

        for form, (mean, square) in self.score(HEAD, self.head_input(hidden), moments):
            yield self.by_name[HEAD], form, float((square - mean**2).mean() / 2)

    def _probabilities(self, x: Floats) -> Floats:
        """The model's probabilities [tokens, vocabulary] for inputs of the output layer."""
        table = self.decoder.head_weight
        probabilities = scratch_array(self.scratch, (len(x), table.shape[0]))
        for start, rows in table.chunks():
            probabilities[:, start : start + len(rows)] = x @ rows.astype(np.float32).T
        for start in range(0, len(x), SCORED_TOKENS):
            logits = torch.from_numpy(probabilities[start : start + SCORED_TOKENS])
            probabilities[start : start + SCORED_TOKENS] = logits.softmax(-1).numpy()
        return probabilities

    def _gradients(self, hidden: torch.Tensor, probabilities: Floats) -> torch.Tensor:
        """Gradients of sampled tokens' log-likelihood before the last norm, [samples, windows, tokens, hidden]."""
        table = self.decoder.head_weight
        pulls = _rows_of(table, _sample_tokens(probabilities))
        for start, rows in table.chunks():
            pulls -= (probabilities[:, start : start + len(rows)] @ rows.astype(np.float32))[None]
        back = torch.from_numpy(pulls).reshape(SAMPLES, *hidden.shape)
        before = torch.empty_like(back)
        x = hidden.clone().requires_grad_(True)
        y = self.decoder.norm()(x)
        for sample in range(SAMPLES):
            (before[sample],) = torch.autograd.grad(y, x, back[sample], retain_graph=True)
        return before


def _sample_tokens(probabilities: Floats) -> npt.NDArray[np.int64]:
    """One token for each row of probabilities [tokens, vocabulary] and each sample, int64 [samples, tokens]."""
    tokens = np.empty((SAMPLES, len(probabilities)), np.int64)
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(probabilities), SCORED_TOKENS):
        part = torch.from_numpy(probabilities[start : start + SCORED_TOKENS])
        tokens[:, start : start + SCORED_TOKENS] = torch.multinomial(part, SAMPLES, True, generator=generator).T.numpy()
    return tokens


def _rows_of(table: Weight, numbers: npt.NDArray[np.int64]) -> Floats:
    """Rows of a table by number, float32 [*numbers.shape, K], each read once."""
    rows = {int(i): table.rows(int(i), int(i) + 1)[0].astype(np.float32) for i in np.unique(numbers)}
    return np.stack([rows[int(i)] for i in numbers.reshape(-1)]).reshape(*numbers.shape, -1)
