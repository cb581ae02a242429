"""What was written is what a weight gives: read again by three runs of rows, whatever the weight is a view of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from lowbit.passes.graph.quantized_ops import add_matmul
from lowbit.passes.methods.gptq import Gptq
from lowbit.passes.methods.hqq import Hqq
from lowbit.passes.methods.mse import Mse
from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.hadamard import Rotation
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.rotated_weight import TurnedWeight
from lowbit.passes.quant.weights import ArrayWeight, SlicedWeight, TransposedWeight, Weight
from lowbit.pipeline.onnx_io.entry import write_entry
from lowbit.pipeline.onnx_io.folder import write_files
from lowbit.pipeline.onnx_io.from_source import wrong_weights
from lowbit.pipeline.store.store import Entry, Store
from lowbit.pipeline.store.weight_keys import SourceDigests
from tests.graphs import random

N, K = 2500, 480
"""Three chunks of float32, the last one short; K ends within a block of 64."""
VIEWS: dict[str, Callable[[Weight], Weight]] = {
    "plain": lambda weight: weight,
    "transposed": lambda weight: TransposedWeight(ArrayWeight(np.ascontiguousarray(weight.load().T))),
    "sliced": lambda weight: SlicedWeight(weight, 100, N - 3),
    "turned": lambda weight: TurnedWeight(weight, None, Rotation(32, 1), Rotation(4, 2)),
}


def written(folder: Path, *weights: QuantizedWeight, known: dict[QuantizedWeight, Entry]) -> tuple[gs.Graph, dict]:
    """A graph of one product after the other side by side, written to `folder`."""
    x = gs.Variable("x", np.float32, [1, K])
    graph = gs.Graph(inputs=[x], opset=21)
    for weight in weights:
        graph.outputs.append(gs.Variable(f"y_{weight.name}", np.float32, [1, weight.source.shape[0]]))
        add_matmul(graph, weight, x, graph.outputs[-1], 0)
    store = Store(folder / ".store")
    return graph, write_files(graph, folder, SourceDigests(store), store, lambda done, total: None, known).entries


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("method", [Rtn(), Mse(), Hqq()], ids=lambda method: type(method).__name__)
@pytest.mark.parametrize("form", [BlockFormat(3, 64, False, "fp16"), BlockFormat(4, 64, False, "fp16", "float")], ids=str)
def test_what_a_method_gives_is_right(tmp_path: Path, view: str, method: Method, form: BlockFormat) -> None:
    weight = QuantizedWeight("w", VIEWS[view](ArrayWeight(random(N, K))), form, method)
    assert len(weight.source.sample()) == 3
    graph, entries = written(tmp_path, weight, known={})
    assert not wrong_weights(graph, tmp_path / "model.onnx", entries)


@pytest.mark.parametrize("part", ["codes", "scales", "zero_points"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_changed_byte_of_the_sample_is_named(tmp_path: Path, part: str, place: str) -> None:
    weight = QuantizedWeight("w", ArrayWeight(random(N, K)), BlockFormat(4, 32, False, "fp16"), Rtn())
    graph, entries = written(tmp_path, weight, known={})
    stored = entries[weight].file(part).read_bytes()
    data = tmp_path / "model.onnx.data"
    whole = bytearray(data.read_bytes())
    at = whole.find(stored) + (0 if place == "first" else len(stored) - 1)
    whole[at] ^= 1
    data.write_bytes(whole)
    rows = "0 to 1091" if place == "first" else "2184 to 2499"
    said = f"rtn gives other {part.replace('_', ' ')} for rows {rows}"
    assert wrong_weights(graph, tmp_path / "model.onnx", entries) == {weight: said}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_that_data_chose_have_the_error_that_was_noted(tmp_path: Path, bits: int) -> None:
    """Two layers; once each with its own codes, once with the other's, whose facts came along."""
    moments = random(600, K)
    hessian = Hessian(moments.T @ moments)
    pair = [
        QuantizedWeight(name, ArrayWeight(random(N, K, seed=seed)), BlockFormat(bits, 32, False, "fp16"), Gptq())
        for seed, name in enumerate("ab")
    ]
    store = Store(tmp_path / ".made")
    made = [store.put(w.name * 4, lambda folder, w=w: write_entry(replace(w, hessian=hessian), folder)) for w in pair]
    for folder, entries in (("right", made), ("wrong", made[::-1])):
        (tmp_path / folder).mkdir()
        graph, found = written(tmp_path / folder, *pair, known=dict(zip(pair, entries, strict=True)))
        wrong = wrong_weights(graph, tmp_path / folder / "model.onnx", found)
        assert set(wrong) == (set() if folder == "right" else set(pair))
        assert all(fault.startswith("their relative error is 1.") for fault in wrong.values())
