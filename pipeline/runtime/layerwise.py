"""A decoder and its inputs -> one of its tensors, layer by layer: one layer's weights in memory, hidden states in between.

A graph is cut by the layer in its nodes' names (`layers.N`): what comes before, each layer, what comes after. Nodes that
depend on constants alone are repeated where they are needed; tensors that later subgraphs read are carried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx_graphsurgeon as gs
import onnxruntime

from lowbit.passes.graph.names import LAYER
from lowbit.pipeline.runtime.memory import return_memory
from lowbit.pipeline.runtime.partition import Feeds, ancestors, inputs_of, partition, subgraph_model
from lowbit.pipeline.runtime.session import open_session
from lowbit.pipeline.runtime.shared_session import SharedSessions, weights_to_feed, widened_values
from lowbit.pipeline.runtime.three_bits import expand_three_bits

Run = Callable[[Feeds], list[npt.NDArray[Any]]]


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
        shared, needed = SharedSessions(self.folder), self._needed_after()
        for number, nodes in enumerate(self.subgraphs):
            last = number == len(self.subgraphs) - 1
            later = needed[number]
            outputs = [self.output] if last else [t.name for node in nodes for t in node.outputs if t.name in later]
            with self._opened(nodes, states[0], outputs, shared) as run:
                for state in states:
                    results = run(state)
                    done += 1
                    progress(done / steps)
                    if last:
                        yield results[0]
                        continue
                    state.update(zip(outputs, results, strict=True))
                    for name in state.keys() - later:
                        del state[name]
            return_memory()

    def _needed_after(self) -> list[set[str]]:
        """Of each subgraph, the tensors that those after it take."""
        needed: list[set[str]] = [set()]
        for nodes in self.subgraphs[:0:-1]:
            needed.insert(0, needed[0] | set(inputs_of(nodes)))
        return needed

    @contextmanager
    def _opened(self, nodes: list[gs.Node], state: Feeds, outputs: list[str], shared: SharedSessions) -> Iterator[Run]:
        """A function from tensors by name, such as `state`, to the outputs of a subgraph, whose weights it holds."""
        weights = weights_to_feed(nodes)
        rest = [node for node in nodes if node.outputs[0].name not in weights]
        inputs = [name for name in inputs_of(rest) if name in state]
        if not weights:
            model = subgraph_model(self.graph, nodes, {name: state[name] for name in inputs}, outputs)
            codes = expand_three_bits(model, self.folder)
            injected = {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in codes.items()}
            # an arena reuses memory from run to run, but may hold twice what the largest tensor takes: logits go without
            session = open_session(model, self.folder, arena=outputs != [self.output], injected=injected)
            yield lambda state: session.run(outputs, {name: state[name] for name in inputs})
            del session, injected, codes
            return
        fed = widened_values(weights)
        examples = {name: state[name] for name in inputs} | fed
        session = shared.get(subgraph_model(self.graph, rest, examples, outputs))
        names = [tensor.name for tensor in session.get_inputs()]
        yield lambda state: session.run(None, dict(zip(names, [*(state[name] for name in inputs), *fed.values()], strict=True)))


def _by_layer(nodes: list[gs.Node]) -> list[list[gs.Node]]:
    """What comes before the layers, each layer, what comes after."""
    layers = 1 + max((int(m.group(1)) for node in nodes if (m := LAYER.search(node.name))), default=-1)

    def place(node: gs.Node, before: list[tuple[gs.Node, int]]) -> int:
        reached = max((number for _, number in before), default=0)
        named = LAYER.search(node.name)
        return max(reached, int(named.group(1)) + 1 if named else (layers + 1 if reached == layers else 0))

    return [subgraph for subgraph in partition(nodes, place) if subgraph]
