"""A quantized decoder's graph -> subgraphs that end at its quantized MatMuls, so that their inputs are seen before the weights.

A subgraph is what leads to the inputs of some MatMuls that do not depend on each other (q, k and v; o; gate and up; down), and
those MatMuls. onnxruntime runs what leads there: norms, attention, activations. The products are left to the caller,
who knows which weights to multiply by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime

from lowbit.passes.graph.quantized_ops import quantized_matmuls
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.checkpoint.safetensors_file import CheckpointWeight
from lowbit.pipeline.runtime.partition import Feeds, ancestors, inputs_of, partition, subgraph_model
from lowbit.pipeline.runtime.session import open_session
from lowbit.pipeline.store.digests import digest


@dataclass(frozen=True, eq=False)
class Product:
    """y [..., N] = x [..., K] @ W^T for a quantized weight W [N, K]; x and y are names of tensors."""

    weight: QuantizedWeight
    x: str
    y: str


@dataclass(frozen=True, eq=False)
class Subgraph:
    """What leads to some products: it reads what earlier subgraphs and their products made."""

    nodes: list[gs.Node]
    products: list[Product]
    inputs: list[str]
    outputs: list[str]


class PartitionedGraph:
    """The subgraphs of a graph, up to its last quantized MatMul.

    Args:
        graph: a decoder with quantized MatMuls, sorted; it is not changed.
        folder: where the float weights that stay as they are lie.
        keep: names of tensors that a subgraph shall give even though no later one reads them.
    """

    def __init__(self, graph: gs.Graph, folder: Path, keep: frozenset[str] = frozenset()) -> None:
        self.graph, self.folder = graph, folder
        weights = {id(node): weight for node, weight in quantized_matmuls(graph)}
        wanted = ancestors([t for node in graph.nodes if id(node) in weights for t in node.outputs])
        parts = partition(
            [node for node in graph.nodes if id(node) in wanted],
            lambda node, before: max((number + (id(maker) in weights) for maker, number in before), default=0),
        )
        leading = [[node for node in part if id(node) not in weights] for part in parts]
        reads = [set(inputs_of(nodes)) for nodes in leading]
        self.subgraphs: list[Subgraph] = []
        for number, part in enumerate(parts):
            matmuls = [node for node in part if id(node) in weights]
            products = [Product(weights[id(node)], node.inputs[0].name, node.outputs[0].name) for node in matmuls]
            later = {product.x for product in products} | keep | set().union(*reads[number + 1 :])
            outputs = {t.name: t for node in leading[number] for t in node.outputs if t.name in later}
            needed = ancestors(list(outputs.values()))
            nodes = [node for node in leading[number] if id(node) in needed]
            self.subgraphs.append(Subgraph(nodes, products, inputs_of(nodes), sorted(outputs)))

    def digest(self, number: int, digest_of: Callable[[Weight], str]) -> str:
        """SHA-256 of what a subgraph computes: its nodes and, by `digest_of`, its constants."""
        subgraph = self.subgraphs[number]
        model = subgraph_model(self.graph, subgraph.nodes, {}, subgraph.outputs)
        constants = {t.name: digest_of(t._values) for t in _constants(subgraph.nodes)}
        used = {node.op_type for node in model.graph.node}
        functions = [function.SerializeToString().hex() for function in model.functions if function.name in used]
        return digest(model.graph.SerializeToString().hex(), functions, constants)

    def run(self, number: int, states: list[Feeds]) -> Iterator[Feeds]:
        """Run what leads to the products of a subgraph on each of `states`.

        Each gets the outputs, loses what is used up, and is yielded before the next one is run.
        """
        subgraph = self.subgraphs[number]
        fed = [name for name in subgraph.inputs if name in states[0]]
        model = subgraph_model(self.graph, subgraph.nodes, {name: states[0][name] for name in fed}, subgraph.outputs)
        values = {t.name: onnxruntime_value(t._values) for t in _constants(subgraph.nodes) if not _on_disk(t._values)}
        _feed_instead(model, values)
        session = open_session(model, self.folder, arena=False)
        later = self.read_after(number)
        for state in states:
            inputs = {name: onnxruntime.OrtValue.ortvalue_from_numpy(state[name]) for name in fed}
            results = session.run_with_ort_values(subgraph.outputs, inputs | values)
            for name in fed:
                if name not in later:
                    del state[name]
            state.update((name, value.numpy()) for name, value in zip(subgraph.outputs, results, strict=True))
            yield state

    def read_after(self, number: int) -> set[str]:
        """Names of the tensors that the subgraphs after one read."""
        return {name for rest in self.subgraphs[number + 1 :] for name in rest.inputs}


def _constants(nodes: list[gs.Node]) -> list[gs.Constant]:
    lazy = {t.name: t for node in nodes for t in node.inputs if isinstance(t, gs.Constant) and isinstance(t._values, Weight)}
    return [lazy[name] for name in sorted(lazy)]


def _on_disk(weight: Weight) -> bool:
    return isinstance(weight, CheckpointWeight)


def onnxruntime_value(weight: Weight) -> onnxruntime.OrtValue:
    """A weight in memory, bfloat16 as onnxruntime takes it: bit patterns."""
    values = np.ascontiguousarray(weight.load())
    if weight.onnx_dtype == onnx.TensorProto.BFLOAT16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values.view(np.uint16), weight.onnx_dtype)
    return onnxruntime.OrtValue.ortvalue_from_numpy(values)


def _feed_instead(model: onnx.ModelProto, values: dict[str, onnxruntime.OrtValue]) -> None:
    """Turn initializers whose values are no bytes of a file into inputs."""
    others = [tensor for tensor in model.graph.initializer if tensor.name not in values]
    for tensor in model.graph.initializer:
        if tensor.name in values:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del model.graph.initializer[:]
    model.graph.initializer.extend(others)
