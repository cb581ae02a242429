"""A tiny finished result, made by the program's own writers: model.onnx, and what MNN's runtime gets beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lowbit.passes.quantize_embedding import QuantizeEmbedding
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.pipeline.convert.mnn.embedding import QuantizedEmbedding
from lowbit.pipeline.convert.mnn.weights import MnnLayer, lay_out
from lowbit.pipeline.onnx_io.folder import write_files
from lowbit.pipeline.onnx_io.reader import read_layers, read_model
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests
from tests.graphs import graph

TEXT = """g (int64[b, n] input_ids) => (float[b, n, 16] y) {
    e = Gather (embed__weight, input_ids)
    a = MatMul (e, three__weight)
    r = Relu (a)
    c = MatMul (r, four__weight)
    y = Add (c, four__bias)
}"""


def write_onnx(folder: Path) -> Path:
    """A model with a quantized embedding, a layer of three bits with offsets, and one of four bits with a bias."""
    numbers = np.random.default_rng(0)
    shapes = {"embed__weight": (8, 32), "three__weight": (32, 32), "four__weight": (32, 16), "four__bias": (16,)}
    weights = {name: numbers.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    small = graph(TEXT, **weights)
    for node, name in zip((n for n in small.nodes if n.op in ("Gather", "MatMul")), ("embed", "three", "four"), strict=True):
        node.name = name
    QuantizeEmbedding(bits=4, block_size=16).apply(small)
    QuantizeMatmul(bits=3, block_size=32, zero_point="float", method="mse", include=("three*",)).apply(small)
    QuantizeMatmul(bits=4, block_size=16, include=("four*",)).apply(small)
    store = Store(folder / ".store")
    folder.mkdir(exist_ok=True)
    write_files(small, folder, SourceDigests(store), store, lambda *done: None, {})
    return folder / MODEL


def write_mnn(model_file: Path, folder: Path, name: str) -> list[bytes]:
    """The weight file of `name`, the embedding's file, and as text: the graph as MNN's converter would give it, and both
    configurations."""
    layers = read_layers(model_file)
    tensors = {tensor.name: tensor for tensor in read_model(model_file).graph.initializer}
    biases = {"four.bias": onnx.numpy_helper.to_array(tensors["four.bias"])}
    linears = [(layer, biases.get(f"{layer.name}.bias")) for layer in layers.values() if not layer.is_embedding]
    placed = lay_out(linears, "fp32")
    with (folder / f"{name}.weight").open("wb") as stream:
        for layer in placed:
            layer.write(stream)
    operators = [{"name": p.layer.name, "type": "Convolution", "main": p.convolution()} for p in placed]
    embedding = QuantizedEmbedding(MnnLayer(next(one for one in layers.values() if one.is_embedding), None, "fp32", 0))
    embedding.write(folder)
    parts: list[dict[str, Any]] = [{"oplists": operators}, embedding.config, {"embedding_file": embedding.file}]
    return [json.dumps(part).encode() for part in parts]
