"""Run a decoder block by block: one layer's weights in memory, hidden states in between.

A graph is cut by the layer in its nodes' names (`layers.N`): what comes before, each layer, what comes after. Nodes that
depend on constants alone are repeated where they are needed; tensors that later segments read are carried.
"""

from __future__ import annotations

import ctypes
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime

from pipeline.sessions import open_session
from pipeline.three_bits import expand_three_bits

LAYER = re.compile(r"layers\.(\d+)[./]")
"""A decoder layer in the name of a node or a weight."""
Feeds = dict[str, np.ndarray]


class Segments:
    """A graph in pieces that are loaded one after the other.

    Args:
        graph: a decoder, its weights in files of `folder`; it is not changed.
        output: the one tensor that is wanted, `logits` or another.
    """

    def __init__(self, graph: gs.Graph, folder: Path, output: str) -> None:
        self.folder = folder
        self.output = output
        self.functions = graph.functions
        self.opset = graph.opset
        self.import_domains = graph.import_domains
        self.tensors: dict[str, gs.Tensor] = dict(graph.tensors())
        nodes = _needed(self.tensors[output])
        self.pieces = _cut([node for node in graph.nodes if id(node) in nodes])

    def run(self, feeds: list[Feeds], progress: Callable[[float], None]) -> Iterator[np.ndarray]:
        """The output for each of `feeds`, in order; all go through a segment before the next is loaded.

        The last segment runs one at a time, as the results are taken: logits of a real vocabulary are large.
        """
        carried = [dict(one) for one in feeds]
        readers = Counter(name for piece in self.pieces for name in _reads(piece))
        total = len(self.pieces) * len(feeds)
        for number, piece in enumerate(self.pieces):
            inputs = [name for name in _reads(piece) if name in carried[0]]
            last = number == len(self.pieces) - 1
            made = {tensor.name for node in piece for tensor in node.outputs}
            later = {name for rest in self.pieces[number + 1 :] for name in _reads(rest)}
            outputs = [self.output] if last else sorted(made & later)
            model = self._model(piece, inputs, outputs, carried[0])
            codes = expand_three_bits(model, self.folder)
            injected = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in codes.items()}
            session = open_session(model, self.folder, arena=False, injected=injected)
            readers.subtract(inputs)
            for done, state in enumerate(carried):
                results = session.run(outputs, {name: state[name] for name in inputs})
                progress((number * len(feeds) + done + 1) / total)
                if last:
                    yield results[0]
                    continue
                state.update(zip(outputs, results, strict=True))
                for name in [name for name in state if readers[name] <= 0]:
                    del state[name]
            del session, injected, codes
            _return_memory()

    def _model(self, piece: list[gs.Node], inputs: list[str], outputs: list[str], state: Feeds):  # type: ignore[no-untyped-def]
        typed = [gs.Variable(name, state[name].dtype, [None] * state[name].ndim) for name in inputs]
        results = [gs.Variable(name, np.float32 if name == "logits" else None) for name in outputs]
        graph = gs.Graph(
            piece, typed, results, functions=self.functions, opset=self.opset, import_domains=list(self.import_domains)
        )
        return gs.export_onnx(graph, do_type_check=False)


def _needed(output: gs.Tensor) -> set[int]:
    """The nodes that a tensor is computed by."""
    found: set[int] = set()
    todo = list(output.inputs)
    while todo:
        node = todo.pop()
        if id(node) not in found:
            found.add(id(node))
            todo += [maker for tensor in node.inputs for maker in tensor.inputs]
    return found


def _cut(nodes: list[gs.Node]) -> list[list[gs.Node]]:
    """Nodes in topological order -> the nodes of each segment, constants repeated."""
    constant: set[int] = set()
    stage: dict[int, int] = {}
    makers = {id(tensor): node for node in nodes for tensor in node.outputs}
    layers = 1 + max((int(m.group(1)) for node in nodes if (m := LAYER.search(node.name))), default=-1)
    for node in nodes:
        before = [makers[id(t)] for t in node.inputs if id(t) in makers]
        known = all(isinstance(t, gs.Constant) or (id(t) in makers and id(makers[id(t)]) in constant) for t in node.inputs)
        if known:
            constant.add(id(node))
        named = LAYER.search(node.name)
        reached = max((stage[id(one)] for one in before if id(one) not in constant), default=0)
        own = int(named.group(1)) + 1 if named else (layers + 1 if reached == layers else 0)
        stage[id(node)] = max(reached, own)
    pieces = []
    for number in range(layers + 2):
        piece = [node for node in nodes if stage[id(node)] == number and id(node) not in constant]
        wanted = {id(node) for node in piece}
        todo = list(piece)
        while todo:
            for tensor in todo.pop().inputs:
                maker = makers.get(id(tensor))
                if maker is not None and id(maker) in constant and id(maker) not in wanted:
                    wanted.add(id(maker))
                    todo.append(maker)
        pieces.append([node for node in nodes if id(node) in wanted])
    return [piece for piece in pieces if piece]


def _reads(piece: list[gs.Node]) -> list[str]:
    """Names of the tensors that a segment takes from outside, each once."""
    made = {id(tensor) for node in piece for tensor in node.outputs}
    names = [t.name for node in piece for t in node.inputs if t.name and id(t) not in made and not isinstance(t, gs.Constant)]
    return list(dict.fromkeys(names))


def _return_memory() -> None:
    """Let the allocator give freed layers back to the system, where it is glibc's."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return
