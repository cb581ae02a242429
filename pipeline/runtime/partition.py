"""A graph -> subgraphs that are models of their own, run one after the other with tensors carried in between."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

Feeds = dict[str, npt.NDArray]
"""Tensors by name: what a model is fed, or what is carried from one subgraph to the next."""


def ancestors(outputs: list[gs.Tensor]) -> set[int]:
    """The nodes (by id) that tensors are computed by."""
    nodes: set[int] = set()
    todo = list(outputs)
    while todo:
        for node in todo.pop().inputs:
            if id(node) not in nodes:
                nodes.add(id(node))
                todo += node.inputs
    return nodes


def constant_nodes(nodes: list[gs.Node]) -> set[int]:
    """The nodes (by id, given in topological order) that depend on constants alone."""
    makers = {id(tensor): node for node in nodes for tensor in node.outputs}
    constant: set[int] = set()
    for node in nodes:
        if all(isinstance(t, gs.Constant) or (id(t) in makers and id(makers[id(t)]) in constant) for t in node.inputs):
            constant.add(id(node))
    return constant


def partition(nodes: list[gs.Node], place: Callable[[gs.Node, list[tuple[gs.Node, int]]], int]) -> list[list[gs.Node]]:
    """Nodes in topological order -> the nodes of each subgraph.

    Nodes that depend on constants alone are in every subgraph that needs them.

    Args:
        place: the number of a node's subgraph, given the nodes before it that are no constants, each with its number.
    """
    constant = constant_nodes(nodes)
    makers = {id(tensor): node for node in nodes for tensor in node.outputs}
    numbers: dict[int, int] = {}
    for node in nodes:
        before = [makers[id(t)] for t in node.inputs if id(t) in makers]
        numbers[id(node)] = place(node, [(maker, numbers[id(maker)]) for maker in before if id(maker) not in constant])
    subgraphs = []
    for number in range(1 + max(numbers.values(), default=0)):
        wanted = {id(node) for node in nodes if numbers[id(node)] == number and id(node) not in constant}
        todo = [node for node in nodes if id(node) in wanted]
        while todo:
            for tensor in todo.pop().inputs:
                maker = makers.get(id(tensor))
                if maker is not None and id(maker) in constant and id(maker) not in wanted:
                    wanted.add(id(maker))
                    todo.append(maker)
        subgraphs.append([node for node in nodes if id(node) in wanted])
    return subgraphs


def inputs_of(nodes: list[gs.Node]) -> list[str]:
    """Names of the tensors that a subgraph takes from outside, each once."""
    made = {id(tensor) for node in nodes for tensor in node.outputs}
    names = [t.name for node in nodes for t in node.inputs if t.name and id(t) not in made and not isinstance(t, gs.Constant)]
    return list(dict.fromkeys(names))


def subgraph_model(graph: gs.Graph, nodes: list[gs.Node], inputs: Feeds, outputs: list[str]) -> onnx.ModelProto:
    """Some nodes of `graph` as a model; `inputs` are examples of what it is fed, among it constants that it then has not."""
    typed = [gs.Variable(name, value.dtype, [None] * value.ndim) for name, value in inputs.items()]
    results = [gs.Variable(name, np.float32 if name == "logits" else None) for name in outputs]
    subgraph = gs.Graph(
        nodes, typed, results, functions=graph.functions, opset=graph.opset, import_domains=list(graph.import_domains)
    )
    model = gs.export_onnx(subgraph, do_type_check=False)
    constants = [tensor for tensor in model.graph.initializer if tensor.name not in inputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(constants)
    model.opset_import.sort(key=lambda entry: entry.domain)  # graphsurgeon's order is that of a set of strings
    return model
