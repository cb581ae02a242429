"""Cut a graph into pieces that are models of their own, run one after the other with tensors carried in between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs

Feeds = dict[str, np.ndarray]


def needed(outputs: list[gs.Tensor]) -> set[int]:
    """The nodes (by id) that tensors are computed by."""
    found: set[int] = set()
    todo = list(outputs)
    while todo:
        for node in todo.pop().inputs:
            if id(node) not in found:
                found.add(id(node))
                todo += node.inputs
    return found


def constant_nodes(nodes: list[gs.Node]) -> set[int]:
    """The nodes (by id, given in topological order) that depend on constants alone."""
    makers = {id(tensor): node for node in nodes for tensor in node.outputs}
    found: set[int] = set()
    for node in nodes:
        if all(isinstance(t, gs.Constant) or (id(t) in makers and id(makers[id(t)]) in found) for t in node.inputs):
            found.add(id(node))
    return found


def pieces(nodes: list[gs.Node], place: Callable[[gs.Node, list[tuple[gs.Node, int]]], int]) -> list[list[gs.Node]]:
    """Nodes in topological order -> the nodes of each piece; those that depend on constants alone are in every piece that
    needs them.

    Args:
        place: the number of a node's piece, given the nodes before it that are no constants, each with its number.
    """
    constant = constant_nodes(nodes)
    makers = {id(tensor): node for node in nodes for tensor in node.outputs}
    stage: dict[int, int] = {}
    for node in nodes:
        before = [makers[id(t)] for t in node.inputs if id(t) in makers]
        stage[id(node)] = place(node, [(one, stage[id(one)]) for one in before if id(one) not in constant])
    found = []
    for number in range(1 + max(stage.values(), default=0)):
        piece = [node for node in nodes if stage[id(node)] == number and id(node) not in constant]
        wanted = {id(node) for node in piece}
        todo = list(piece)
        while todo:
            for tensor in todo.pop().inputs:
                maker = makers.get(id(tensor))
                if maker is not None and id(maker) in constant and id(maker) not in wanted:
                    wanted.add(id(maker))
                    todo.append(maker)
        found.append([node for node in nodes if id(node) in wanted])
    return found


def reads(piece: list[gs.Node]) -> list[str]:
    """Names of the tensors that a piece takes from outside, each once."""
    made = {id(tensor) for node in piece for tensor in node.outputs}
    names = [t.name for node in piece for t in node.inputs if t.name and id(t) not in made and not isinstance(t, gs.Constant)]
    return list(dict.fromkeys(names))


def piece_model(graph: gs.Graph, piece: list[gs.Node], inputs: Feeds, outputs: list[str]) -> onnx.ModelProto:
    """A piece of `graph` as a model; `inputs` are examples of what it is fed."""
    typed = [gs.Variable(name, value.dtype, [None] * value.ndim) for name, value in inputs.items()]
    results = [gs.Variable(name, np.float32 if name == "logits" else None) for name in outputs]
    one = gs.Graph(
        piece, typed, results, functions=graph.functions, opset=graph.opset, import_domains=list(graph.import_domains)
    )
    model = gs.export_onnx(one, do_type_check=False)
    model.opset_import.sort(key=lambda entry: entry.domain)  # graphsurgeon's order is that of a set of strings
    return model
