"""Subgraphs that differ in names and weights alone -> one session for all of them, which is fed the weights.

Thirty layers of a decoder are the same graph: a session made for each would optimize it thirty times, copy every weight, and
get all of its memory from the system anew.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnx import TensorProto

from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.weights import ArrayWeight, Reader, Weight
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import open_session

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


class SharedSessions:
    """Sessions by the structure of what they run.

    Args:
        folder: where the files of weights that are not fed lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sessions: dict[bytes, onnxruntime.InferenceSession] = {}

    def get(self, model: onnx.ModelProto) -> onnxruntime.InferenceSession:
        """A session of a model, its tensors renamed by `unnamed`: a new one where none of this structure is open."""
        unnamed(model)
        key = model.SerializeToString(deterministic=True)
        if key not in self.sessions:
            self.sessions[key] = open_session(model, self.folder)
        return self.sessions[key]


def unnamed(model: onnx.ModelProto) -> None:
    """Give every tensor of a model the number that it comes at, and no name to its nodes."""
    graph, numbers = model.graph, dict[str, str]()
    del graph.value_info[:]

    def number(name: str) -> str:
        return numbers.setdefault(name, f"t{len(numbers)}") if name else ""

    for named in (*graph.input, *graph.output, *graph.initializer):
        named.name = number(named.name)
    for node in graph.node:
        node.name = ""
        node.input[:], node.output[:] = map(number, node.input), map(number, node.output)


def weights_to_feed(nodes: list[gs.Node]) -> dict[str, Weight]:
    """The float weights of a subgraph by the names of the tensors to feed, float32; none where it may not be fed.

    A Cast that widens a weight is done before. A table that rows are looked up in stays in its file, and where weights are
    quantized nothing is fed: the kernels want constants.
    """
    read = [(node, t) for node in nodes for t in node.inputs if isinstance(t, gs.Constant) and _in_file(t)]
    looked_up = any(node.op == "Gather" for node, _ in read)
    if looked_up or any((node.domain and node.op != "FusedMatMul") or _has_subgraphs(node) for node in nodes):
        return {}
    return {node.outputs[0].name if node.op == "Cast" else tensor.name: tensor._values for node, tensor in read}


def _in_file(constant: gs.Constant) -> bool:
    values = constant._values
    return isinstance(values, Weight) and not isinstance(values, ArrayWeight) and values.onnx_dtype in FLOATS


def _has_subgraphs(node: gs.Node) -> bool:
    return any(isinstance(value, gs.Graph) for value in node.attrs.values())


def widened_values(weights: dict[str, Weight]) -> Feeds:
    """Weights as float32, read and dequantized on every core."""
    arrays: Feeds = {name: np.empty(weight.shape, np.float32) for name, weight in weights.items()}

    def fill(piece: tuple[str, Reader, int, int]) -> None:
        name, read, start, stop = piece
        arrays[name][start:stop] = read(start, stop)

    pieces = ((name, read, *span) for name, weight in weights.items() for read in [weight.reader()] for span in weight.ranges())
    for _ in in_order(fill, pieces):
        pass
    return arrays
