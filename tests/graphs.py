"""Small graphs as ONNX text, with weights, and how to run them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import onnxruntime

from lowbit.passes.graph.quantized_ops import quantized_weight
from lowbit.passes.quant.quantized_weight import QuantizedWeight

HEADER = '<ir_version: 10, opset_import: ["": 18]>\n'


def graph(text: str, **weights: np.ndarray) -> gs.Graph:
    """A graph from ONNX text; `weights` become constants, `__` in their names a dot."""
    model = onnx.parser.parse_model(HEADER + text)
    for name, values in weights.items():
        tensor = onnx.numpy_helper.from_array(values, name)
        model.graph.initializer.append(tensor)
    found = gs.import_onnx(model)
    for tensor in found.tensors().values():
        tensor.name = tensor.name.replace("__", ".")
    return found


def run(graph: gs.Graph, check: bool = True, **inputs: np.ndarray) -> list[np.ndarray]:
    """All outputs of a graph in onnxruntime, its lazy weights computed first.

    Args:
        check: whether onnx's checker shall see it, which does not know onnxruntime's own operators.
    """
    loaded = graph.copy()
    for tensor in loaded.tensors().values():
        if isinstance(tensor, gs.Constant):
            tensor._values = tensor._values.load() if hasattr(tensor._values, "load") else tensor._values
    model = gs.export_onnx(loaded)
    if check:
        onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def weights_of(graph: gs.Graph) -> dict[str, QuantizedWeight]:
    """The quantized weights of a graph by layer."""
    found: list[Any] = [quantized_weight(node) for node in graph.nodes]
    return {weight.name: weight for weight in found if weight is not None}


def dequantized(weight: QuantizedWeight) -> np.ndarray:
    """The weight that its codes stand for, float32 [N, K]."""
    return weight.method.quantize(weight.source.load(), weight.form).dequantize(weight.source.shape[1])


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
