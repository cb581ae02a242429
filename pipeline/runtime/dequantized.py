"""A quantized model.onnx -> the float graph that its codes stand for, each weight dequantized as it is read.

Exact arithmetic without the engine's kernels: onnxruntime's MatMulNBits in float32 (accuracy_level 0) dequantizes on every
call where bits are two or zero points are floats, and is many times slower than a product of floats.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.passes.graph.quantized_ops import DOMAIN, MICROSOFT
from lowbit.passes.lowering.fuse_transpose import FuseTranspose
from lowbit.passes.quant.weights import DerivedWeight, Reader, Weight
from lowbit.pipeline.onnx_io.reader import read_layers, region
from lowbit.pipeline.onnx_io.stored_layer import StoredLayer
from lowbit.pipeline.runtime.session import load_model


class DequantizedWeight(DerivedWeight):
    """What the codes of a layer stand for, float32 [N, K]."""

    def __init__(self, layer: StoredLayer) -> None:
        super().__init__((layer.n, layer.k), TensorProto.FLOAT)
        self.layer = layer

    def reader(self) -> Reader:
        return lambda start, stop: self.layer.block_rows(start, stop).dequantize(self.layer.k)


class StoredWeight(Weight):
    """A constant that lies in a file beside its model."""

    def __init__(self, file: Path, tensor: TensorProto) -> None:
        super().__init__(tuple(tensor.dims), tensor.data_type)
        self.region, self.placed = region(file, tensor), tensor

    def rows(self, start: int, stop: int) -> npt.NDArray[Any]:
        return self.region.rows(start, stop)

    @property
    def tensor(self) -> TensorProto:
        return self.placed


def dequantized_graph(file: Path) -> gs.Graph:
    """The graph of a quantized model, every quantized MatMul a product with its dequantized weight; no weight is read.

    Quantized embeddings stay: onnxruntime dequantizes the rows that it looks up, in float.
    """
    model, layers = load_model(file), read_layers(file)
    graph = gs.import_onnx(model)
    tensors = graph.tensors()
    for proto in model.graph.initializer:
        if proto.data_location == TensorProto.EXTERNAL:
            tensors[proto.name].values = StoredWeight(file, proto)
    for node in graph.nodes:
        if node.op not in ("MatMulNBits", "MatMul3Bits"):
            continue
        weight = gs.Constant(f"{node.name}.dequantized", DequantizedWeight(layers[node.name]))
        node.op, node.domain, node.attrs, node.inputs = "FusedMatMul", MICROSOFT, {"transB": 1}, [node.inputs[0], weight]
    graph.functions = [function for function in graph.functions if function.domain != DOMAIN]
    FuseTranspose().apply(graph)  # of what was left in float; drops what is not needed any more
    return graph
