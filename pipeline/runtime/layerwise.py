"""Run a decoder block by block: one layer's weights in memory, hidden states in between.

A graph is cut by the layer in its nodes' names (`layers.N`): what comes before, each layer, what comes after. Nodes that
depend on constants alone are repeated where they are needed; tensors that later segments read are carried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime

from lowbit.passes.graph.names import LAYER
from lowbit.pipeline.runtime.memory import return_memory
from lowbit.pipeline.runtime.partition import Feeds, needed, piece_model, pieces, reads
from lowbit.pipeline.runtime.session import open_session
from lowbit.pipeline.runtime.three_bits import expand_three_bits


class Segments:
    """A graph in pieces that are loaded one after the other.

    Args:
        graph: a decoder, its weights in files of `folder`; it is not changed.
        output: the one tensor that is wanted, `logits` or another.
    """

    def __init__(self, graph: gs.Graph, folder: Path, output: str) -> None:
        self.graph = graph
        self.folder = folder
        self.output = output
        nodes = needed([graph.tensors()[output]])
        self.pieces = _by_layer([node for node in graph.nodes if id(node) in nodes])

    def run(self, feeds: list[Feeds], progress: Callable[[float], None]) -> Iterator[np.ndarray]:
        """The output for each of `feeds`, in order; all go through a segment before the next is loaded.

        The last segment runs one at a time, as the results are taken: logits of a real vocabulary are large.
        """
        carried = [dict(one) for one in feeds]
        readers = Counter(name for piece in self.pieces for name in reads(piece))
        total = len(self.pieces) * len(feeds)
        for number, piece in enumerate(self.pieces):
            inputs = [name for name in reads(piece) if name in carried[0]]
            last = number == len(self.pieces) - 1
            made = {tensor.name for node in piece for tensor in node.outputs}
            later = {name for rest in self.pieces[number + 1 :] for name in reads(rest)}
            outputs = [self.output] if last else sorted(made & later)
            model = piece_model(self.graph, piece, {name: carried[0][name] for name in inputs}, outputs)
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
            return_memory()


def _by_layer(nodes: list[gs.Node]) -> list[list[gs.Node]]:
    """What comes before the layers, each layer, what comes after."""
    layers = 1 + max((int(m.group(1)) for node in nodes if (m := LAYER.search(node.name))), default=-1)

    def place(node: gs.Node, before: list[tuple[gs.Node, int]]) -> int:
        reached = max((stage for _, stage in before), default=0)
        named = LAYER.search(node.name)
        return max(reached, int(named.group(1)) + 1 if named else (layers + 1 if reached == layers else 0))

    return [piece for piece in pieces(nodes, place) if piece]
