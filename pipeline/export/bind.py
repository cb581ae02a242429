"""An exported graph's weights -> lazy constants of the checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from lowbit.passes.quant.weights import widened
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.onnx_model import OnnxModel
from lowbit.pipeline.checkpoint.safetensors_file import CheckpointWeight
from lowbit.pipeline.errors import ExportError

RUNTIME_INPUTS = re.compile(r"(input_ids|attention_mask|token_type_ids|position_ids|pixel_values|past_key_values\..*)$")
"""What a model is fed; every other input of an exported graph is a weight."""


def bind(graph: gs.Graph, checkpoint: Checkpoint) -> None:
    """Replace every weight input of an exported graph by a lazy constant of the checkpoint.

    Weights keep the checkpoint's dtype; where that is not float32, a Cast widens them.

    Raises:
        ExportError: a weight is missing, or its shape is not the one that the config describes.
    """
    inputs, missing = [], []
    wanted = [tensor for tensor in graph.inputs if _is_weight(tensor)]
    prefix = _common_prefix({t.name for t in wanted}, set(checkpoint.weights))
    for tensor in graph.inputs:
        if not _is_weight(tensor):
            inputs.append(tensor)
            continue
        weight = checkpoint.weights.get(prefix + tensor.name) or _tied(tensor.name, checkpoint)
        if weight is None:
            missing.append(tensor.name)
            continue
        if tuple(tensor.shape) != weight.shape:
            raise ExportError(
                f"{weight.file}: '{tensor.name}' has the shape {list(weight.shape)}, config.json describes "
                f"{list(tensor.shape)}. The two files belong to different models."
            )
        _replace(graph, tensor, weight)
    if missing:
        raise ExportError(
            f"{checkpoint.folder}: no tensor '{missing[0]}'"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else "")
            + ", which config.json requires. A shard is missing, or the checkpoint is of another architecture."
        )
    graph.inputs = inputs


def _is_weight(tensor: gs.Tensor) -> bool:
    return RUNTIME_INPUTS.match(tensor.name) is None


def _common_prefix(wanted: set[str], present: set[str]) -> str:
    """`bert.` where a checkpoint with a task head keeps the encoder under a prefix; else the empty string."""
    if wanted & present:
        return ""
    prefixes = {name[: -len(w)] for w in sorted(wanted)[:1] for name in present if name.endswith("." + w)}
    return prefixes.pop() if len(prefixes) == 1 else ""


def _tied(name: str, checkpoint: Checkpoint) -> CheckpointWeight | None:
    """Old checkpoints of tied models store either name of the shared table."""
    if not checkpoint.config.get("tie_word_embeddings"):
        return None
    pair = {"model.embed_tokens.weight": "lm_head.weight", "lm_head.weight": "model.embed_tokens.weight"}
    return checkpoint.weights.get(pair.get(name, ""))


def _replace(graph: gs.Graph, tensor: gs.Variable, weight: CheckpointWeight) -> None:
    wide = widened(graph, tensor.name, weight)
    for node in list(tensor.outputs):
        node.inputs = [wide if given is tensor else given for given in node.inputs]


def load_graph(path: Path, checkpoint: Checkpoint) -> gs.Graph:
    """The exported graph at `path` with its weights bound to `checkpoint`, or an ONNX file's own."""
    if isinstance(checkpoint, OnnxModel):
        return checkpoint.graph()
    graph = gs.import_onnx(onnx.load(str(path), load_external_data=False))
    graph.name = "model"
    bind(graph, checkpoint)
    return graph
