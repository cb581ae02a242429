"""A quantized decoder's graph cut at its quantized MatMuls, so that their inputs can be looked at before they are quantized.

A stage is what leads to the inputs of some MatMuls that do not depend on each other (q, k and v; o; gate and up; down), and
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
from lowbit.pipeline.checkpoint.huggingface import CheckpointWeight
from lowbit.pipeline.runtime.partition import Feeds, needed, piece_model, pieces, reads
from lowbit.pipeline.runtime.session import open_session
from lowbit.pipeline.store.digests import digest


@dataclass(frozen=True, eq=False)
class Product:
    """y [..., N] = x [..., K] @ W^T for a quantized weight W [N, K]; x and y are names of tensors."""

    weight: QuantizedWeight
    x: str
    y: str


@dataclass(frozen=True, eq=False)
class Stage:
    """What leads to some products: it reads what earlier stages and their products made."""

    nodes: list[gs.Node]
    products: list[Product]
    inputs: list[str]
    outputs: list[str]


class Stages:
    """The stages of a graph, up to its last quantized MatMul.

    Args:
        graph: a decoder with quantized MatMuls, sorted; it is not changed.
        folder: where the float weights that stay as they are lie.
        keep: names of tensors that a stage shall give even though no later one reads them.
    """

    def __init__(self, graph: gs.Graph, folder: Path, keep: frozenset[str] = frozenset()) -> None:
        self.graph, self.folder = graph, folder
        found = {id(node): weight for node, weight in quantized_matmuls(graph)}
        wanted = needed([t for n in graph.nodes if id(n) in found for t in n.outputs])
        cut = pieces(
            [node for node in graph.nodes if id(node) in wanted],
            lambda node, before: max((stage + (id(one) in found) for one, stage in before), default=0),
        )
        read = [set(reads([n for n in piece if id(n) not in found])) for piece in cut]
        self.stages: list[Stage] = []
        for number, piece in enumerate(cut):
            products = [Product(found[id(n)], n.inputs[0].name, n.outputs[0].name) for n in piece if id(n) in found]
            later = {product.x for product in products} | keep | set().union(*read[number + 1 :])
            made = {t.name: t for n in piece if id(n) not in found for t in n.outputs if t.name in later}
            inside = needed(list(made.values()))
            nodes = [n for n in piece if id(n) in inside and id(n) not in found]
            self.stages.append(Stage(nodes, products, reads(nodes), sorted(made)))

    def digest(self, number: int, digest_of: Callable[[Weight], str]) -> str:
        """SHA-256 of what a stage computes: its nodes and, by `digest_of`, its constants."""
        stage = self.stages[number]
        model = piece_model(self.graph, stage.nodes, {}, stage.outputs)
        constants = {t.name: digest_of(t._values) for t in _constants(stage.nodes)}
        used = {node.op_type for node in model.graph.node}
        functions = [function.SerializeToString().hex() for function in model.functions if function.name in used]
        return digest(model.graph.SerializeToString().hex(), functions, constants)

    def run(self, number: int, states: list[Feeds]) -> Iterator[Feeds]:
        """Run what leads to the products of a stage on each of `states`, which get its outputs and lose what is used up."""
        stage = self.stages[number]
        fed = [name for name in stage.inputs if name in states[0]]
        model = piece_model(self.graph, stage.nodes, {name: states[0][name] for name in fed}, stage.outputs)
        values = {t.name: onnxruntime_value(t._values) for t in _constants(stage.nodes) if not _on_disk(t._values)}
        _feed_instead(model, values)
        session = open_session(model, self.folder, arena=False)
        later = self.read_after(number)
        for state in states:
            inputs = {name: onnxruntime.OrtValue.ortvalue_from_numpy(state[name]) for name in fed}
            results = session.run_with_ort_values(stage.outputs, inputs | values)
            for name in fed:
                if name not in later:
                    del state[name]
            state.update((name, value.numpy()) for name, value in zip(stage.outputs, results, strict=True))
            yield state

    def read_after(self, number: int) -> set[str]:
        """Names of the tensors that the stages after one read."""
        return {name for rest in self.stages[number + 1 :] for name in rest.inputs}


def _constants(nodes: list[gs.Node]) -> list[gs.Constant]:
    found = {t.name: t for node in nodes for t in node.inputs if isinstance(t, gs.Constant) and isinstance(t._values, Weight)}
    return [found[name] for name in sorted(found)]


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
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in values]
    for tensor in model.graph.initializer:
        if tensor.name in values:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
