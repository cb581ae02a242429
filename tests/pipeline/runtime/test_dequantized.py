"""Dequantized weights multiplied as floats are what onnxruntime's own float arithmetic makes of the codes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from lowbit.pipeline.runtime.layerwise import LayerwiseModel
from lowbit.pipeline.runtime.session import decoder_feeds, open_model, open_reference, weight_folder
from lowbit.pipeline.runtime.shared_session import SharedSessions
from lowbit.pipeline.validate.metrics import relative_error
from lowbit.pipeline.validate.text import exact_logits, rounding_levels
from tests.conftest import Exported

TOLERANCE = 2e-6
"""Relative error of logits that differ in the order of their sums alone."""


@pytest.mark.parametrize("zero_point", ["integer", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_exact_pass_equals_the_slow_kernels(results: Callable[..., Path], bits: int, zero_point: str) -> None:
    options = f"{{bits: {bits}, block_size: 32, zero_point: {zero_point}}}"
    file = results("narrow_embedding", f"quantize_matmul: {options}") / "onnx" / "model.onnx"
    ids = np.arange(1, 13)[None]
    (found,) = exact_logits(file, [ids], lambda done: None)
    session = open_model(file, accuracy_level=0)
    expected = session.run(["logits"], decoder_feeds(session, ids))[0]
    assert relative_error(found, expected) < TOLERANCE
    assert rounding_levels(file) == (set() if zero_point == "float" else {4})


def test_layers_of_one_structure_share_a_session(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    _, graph = exported("llama", num_hidden_layers=5)
    used: list[onnxruntime.InferenceSession] = []
    get = SharedSessions.get
    monkeypatch.setattr(SharedSessions, "get", lambda self, model: (used.append(get(self, model)), used[-1])[1])
    feeds = decoder_feeds(graph, np.arange(1, 7)[None])
    found = next(LayerwiseModel(graph, weight_folder(graph), "logits").run([feeds], lambda done: None))
    np.testing.assert_allclose(found, open_reference(graph).run(["logits"], feeds)[0], rtol=1e-4, atol=1e-5)
    assert len(set(map(id, used))) <= len(used) - 3, "the layers after the first are alike"
