"""What layers' outputs lose, against slow references: finite differences of the whole model, and its own hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quantize_matmul import find_matmuls
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.mixed_precision import sensitivity_fisher
from lowbit.pipeline.mixed_precision.sensitivity import Layer
from lowbit.pipeline.mixed_precision.sensitivity_blocks import BlockwiseMetric
from lowbit.pipeline.mixed_precision.sensitivity_fisher import Fisher
from lowbit.pipeline.mixed_precision.sensitivity_output import OutputError
from lowbit.pipeline.runtime.torch_decoder import TorchDecoder
from lowbit.pipeline.store.store import Store

FORMS = [BlockFormat(3, 32, False, "fp16"), BlockFormat(4, 16, False, "fp16")]
WINDOWS = np.random.default_rng(5).integers(1, 300, (6, 8))
Make = Callable[..., tuple[BlockwiseMetric, TorchDecoder]]


@pytest.fixture
def make(exported: Callable, tmp_path: Path) -> Make:
    def build(
        kind: type[BlockwiseMetric], family: str = "llama", windows: np.ndarray = WINDOWS, **options: object
    ) -> tuple[BlockwiseMetric, TorchDecoder]:
        checkpoint, graph = exported(family, **options)
        layers = [Layer(name, node, operand.weight) for name, (node, operand) in find_matmuls(graph).items()]
        metric = kind(graph, checkpoint, layers, Rtn(), windows, "model", Store(tmp_path / "store"))
        return metric, TorchDecoder.of_graph(checkpoint, graph)

    return build


def away(metric: BlockwiseMetric, layer: Layer, form: BlockFormat) -> torch.Tensor:
    rows = layer.weight.load().astype(np.float32)
    return torch.from_numpy(metric.method.quantize(rows, form).dequantize(rows.shape[1]) - rows)


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_fisher_is_the_second_order_of_the_divergence(make: Make, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Half the variance of the logits' change, by finite differences; what is sampled from 600 texts is within a fifth."""
    monkeypatch.setattr(sensitivity_fisher, "SAMPLES", 600)
    windows = WINDOWS[:2]
    metric, decoder = make(Fisher, family, windows, **({"tie_word_embeddings": False} if family == "llama" else {}))
    found = metric.measure(FORMS, lambda _: None)
    model, ids = decoder.whole().double(), torch.from_numpy(windows)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        p = before.softmax(-1)
        for layer in metric.layers:
            place = model.get_submodule(layer.name).weight
            kept = place.data.clone()
            for form in FORMS:
                place.data = kept + 1e-4 * away(metric, layer, form).double()
                change = (model(ids, use_cache=False).logits - before) / 1e-4
                expected = float(((p * change**2).sum(-1) - (p * change).sum(-1) ** 2).mean() / 2)
                tolerance = 2e-3 if layer.name == "lm_head" else 0.2
                assert found[layer.name, form] == pytest.approx(expected, rel=tolerance), layer.name
            place.data = kept


def test_output_error_is_that_of_the_layers_outputs(make: Make) -> None:
    metric, decoder = make(OutputError)
    found = metric.measure(FORMS, lambda _: None)
    model, inputs = decoder.whole(), {}
    for layer in metric.layers:
        keep = lambda _, given, __, name=layer.name: inputs.update({name: given[0].reshape(-1, given[0].shape[-1])})  # noqa: E731
        model.get_submodule(layer.name).register_forward_hook(keep)
    with torch.no_grad():
        model(torch.from_numpy(WINDOWS), use_cache=False)
    for layer in metric.layers:
        x, w = inputs[layer.name].double(), torch.from_numpy(layer.weight.load().astype(np.float64))
        for form in FORMS:
            expected = (x @ away(metric, layer, form).double().T).square().sum() / (x @ w.T).square().sum()
            assert found[layer.name, form] == pytest.approx(float(expected), rel=1e-4)


def test_what_was_measured_is_recalled(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    metric, _ = make(Fisher)
    assert metric.known(FORMS) is None
    first = metric.measure(FORMS, lambda _: None)

    def fail(_: object, __: object) -> Iterator[None]:
        raise AssertionError("measured again")

    monkeypatch.setattr(Fisher, "run", fail)
    again, _ = make(Fisher)
    assert again.measure(FORMS, lambda _: None) == first == again.known(FORMS)


def test_models_of_another_kind_are_refused(make: Make) -> None:
    metric, _ = make(Fisher, "granite")
    with pytest.raises(PipelineError, match="sensitivity: fisher needs logits that are a plain product"):
        metric.measure(FORMS, lambda _: None)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "qwen3_moe", "olmo2", "smollm3", "mistral"])
def test_families(make: Make, family: str) -> None:
    for kind in (Fisher, OutputError):
        metric, _ = make(kind, family)
        found = metric.measure(FORMS[:1], lambda _: None)
        assert set(found) == {(layer.name, FORMS[0]) for layer in metric.layers}
        assert all(value >= 0 and np.isfinite(value) for value in found.values())
        assert sum(value > 0 for value in found.values()) > 0.7 * len(found)
