"""`sensitivity: kl`: a weight replaced by its quantized self -> how far the output moves; the whole float model in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.method import Method
from lowbit.pipeline.mixed_precision.sensitivity import Layer, LayerChoice, SensitivityMetric
from lowbit.pipeline.runtime.session import decoder_feeds, open_reference
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.validate.metrics import score_tokens


class OutputDivergence(SensitivityMetric):
    """KL divergence of a float decoder's output when one of its weights is replaced, nats per token.

    Args:
        graph: float; it is changed: the weights of `layers` become inputs, so that one session serves all.
        windows: token ids int64 [windows, tokens] to compare on.
        model: digest of the model and of the passes that were applied to it.
    """

    def __init__(
        self, graph: gs.Graph, layers: list[Layer], method: Method, windows: npt.NDArray[np.int64], model: str, store: Store
    ) -> None:
        super().__init__(layers, method, digest(model, windows.tolist(), versions(("onnxruntime",))), store)
        self.graph, self.windows = graph, windows

    def run(self, choices: list[LayerChoice]) -> Iterator[tuple[Layer, BlockFormat, float]]:
        """The sensitivity of each choice, in the order given."""
        weights: dict[str, npt.NDArray[np.float32]] = {}
        for layer in self.layers:
            n, k = layer.weight.shape
            probe = gs.Variable(f"{layer.name}.probe", np.float32, [k, n])
            layer.node.inputs[1] = probe
            self.graph.inputs.append(probe)
            weights[probe.name] = np.ascontiguousarray(layer.weight.load().astype(np.float32).T)
        self.graph.cleanup().toposort()
        session = open_reference(self.graph)
        feeds = weights | decoder_feeds(session, self.windows)
        expected = session.run(["logits"], feeds)[0]
        for layer, form in choices:
            rows = layer.weight.load()
            changed = self.method.quantize(rows, form).dequantize(rows.shape[1]).astype(np.float32)
            logits = session.run(["logits"], feeds | {f"{layer.name}.probe": np.ascontiguousarray(changed.T)})[0]
            yield layer, form, self._divergence(expected, logits)

    def _divergence(self, expected: npt.NDArray[np.float32], logits: npt.NDArray[np.float32]) -> float:
        flat = [np.ascontiguousarray(rows[:, :-1]).reshape(-1, rows.shape[-1]) for rows in (expected, logits)]
        return float(score_tokens(flat[0], flat[1], self.windows[:, 1:].reshape(-1))[:, 2].mean())
