"""A graph with a checkpoint's matrices and nothing else: what a plan applies passes to."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.quant.weights import widened
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.safetensors_file import CheckpointWeight


def sketch(checkpoint: Checkpoint) -> gs.Graph:
    """A graph with the checkpoint's matrices as an exporter would use them, and nothing else."""
    graph = gs.Graph(name="sketch", opset=18)
    ids = gs.Variable("input_ids", np.int64, ["batch", "tokens"])
    graph.inputs = [ids]
    for name, weight in checkpoint.weights.items():
        if len(weight.shape) != 2 or not name.endswith(".weight"):
            continue
        table = widened(graph, name, weight)
        scope = "/" + name.removesuffix(".weight").replace(".", "/")
        if "embed" in name:
            _add(graph, "Gather", f"{scope}/Gather", [table, ids])
            if checkpoint.config.get("tie_word_embeddings") and name.endswith("embed_tokens.weight"):
                _linear(graph, "/lm_head", table, weight)
        elif not (name == "lm_head.weight" and checkpoint.config.get("tie_word_embeddings")):
            _linear(graph, scope, table, weight)
    return graph.toposort()


def _linear(graph: gs.Graph, scope: str, table: gs.Tensor, weight: CheckpointWeight) -> None:
    x = gs.Variable(f"{scope}/x", np.float32, ["batch", "tokens", weight.shape[1]])
    graph.inputs.append(x)
    turned = gs.Variable(f"{scope}/Transpose", np.float32)
    graph.nodes.append(gs.Node("Transpose", turned.name, {"perm": [1, 0]}, [table], [turned]))
    _add(graph, "MatMul", f"{scope}/MatMul", [x, turned])


def _add(graph: gs.Graph, op: str, name: str, inputs: list[gs.Tensor]) -> None:
    output = gs.Variable(f"{name}_output", np.float32)
    graph.nodes.append(gs.Node(op, name, {}, inputs, [output]))
    graph.outputs.append(output)
