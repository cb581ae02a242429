"""A decoder and its inputs -> one of its tensors, layer by layer: one layer's weights in memory, hidden states in between.

A graph is cut by the layer in its nodes' names (`layers.N`): what comes before, each layer, what comes after. Nodes that
depend on constants alone are repeated where they are needed; tensors that later subgraphs read are carried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy.typing as npt
import onnx_graphsurgeon as gs
import onnxruntime

from lowbit.passes.graph.names import LAYER
from lowbit.pipeline.runtime.memory import return_memory
from lowbit.pipeline.runtime.partition import Feeds, ancestors, inputs_of, partition, subgraph_model
from lowbit.pipeline.runtime.session import open_session
from lowbit.pipeline.runtime.three_bits import expand_three_bits


class LayerwiseModel:
    """A graph that is run as subgraphs, loaded one after the other.

    Args:
        graph: a decoder, its weights in files of `folder`; it is not changed.
        output: the one tensor that is wanted, `logits` or another.
    """

    def __init__(self, graph: gs.Graph, folder: Path, output: str) -> None:
        self.graph = graph
        self.folder = folder
        self.output = output
        nodes = ancestors([graph.tensors()[output]])
        self.subgraphs = _by_layer([node for node in graph.nodes if id(node) in nodes])

    def run(self, feeds: list[Feeds], progress: Callable[[float], None]) -> Iterator[npt.NDArray]:
        """The output for each of `feeds`, in order; all go through a subgraph before the next is loaded.

        The last subgraph runs one at a time, as the results are taken: logits of a real vocabulary are large.

        Args:
            progress: gets the share done.
        """
        states = [dict(feed) for feed in feeds]
        steps, done = len(self.subgraphs) * len(feeds), 0
        for number, nodes in enumerate(self.subgraphs):
            last = number == len(self.subgraphs) - 1
            inputs = [name for name in inputs_of(nodes) if name in states[0]]
            later = {name for rest in self.subgraphs[number + 1 :] for name in inputs_of(rest)}
            made = {tensor.name for node in nodes for tensor in node.outputs}
            outputs = [self.output] if last else sorted(made & later)
            model = subgraph_model(self.graph, nodes, {name: states[0][name] for name in inputs}, outputs)
            codes = expand_three_bits(model, self.folder)
            injected = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in codes.items()}
            session = open_session(model, self.folder, arena=False, injected=injected)
            for state in states:
                results = session.run(outputs, {name: state[name] for name in inputs})
                done += 1
                progress(done / steps)
                if last:
                    yield results[0]
                    continue
                state.update(zip(outputs, results, strict=True))
                for name in state.keys() - later:
                    del state[name]
            del session, injected, codes
            return_memory()


def _by_layer(nodes: list[gs.Node]) -> list[list[gs.Node]]:
    """What comes before the layers, each layer, what comes after."""
    layers = 1 + max((int(m.group(1)) for node in nodes if (m := LAYER.search(node.name))), default=-1)

    def place(node: gs.Node, before: list[tuple[gs.Node, int]]) -> int:
        reached = max((number for _, number in before), default=0)
        named = LAYER.search(node.name)
        return max(reached, int(named.group(1)) + 1 if named else (layers + 1 if reached == layers else 0))

    return [subgraph for subgraph in partition(nodes, place) if subgraph]
