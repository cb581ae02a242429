"""`export:` a checkpoint -> ONNX, through optimum, without loading a weight.

The graph is traced from a model on the meta device; weights are graph inputs that carry the checkpoint's
names, and `bind` ties them to the .safetensors files they stay in.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_graphsurgeon as gs

from passes._weights import widened
from passes.base import Options
from pipeline.checkpoint import Checkpoint, CheckpointWeight
from pipeline.errors import ExportError
from pipeline.onnx_source import OnnxModel
from pipeline.segments import LAYER
from pipeline.transformers_config import transformers_config, translated

DECODERS = (
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "smollm3",
)
ENCODERS, VISION = ("bert", "distilbert", "roberta", "xlm-roberta"), ("vit",)
SUPPORTED = dict.fromkeys(DECODERS, "decoder") | dict.fromkeys(ENCODERS, "encoder") | dict.fromkeys(VISION, "vision encoder")
"""`model_type` of config.json -> kind. Others may export, but nobody has proven their numbers."""

MODELS = {
    "text-generation-with-past": "AutoModelForCausalLM", "feature-extraction": "AutoModel",
    "image-classification": "AutoModelForImageClassification", "text-classification": "AutoModelForSequenceClassification",
}  # fmt: skip
"""transformers' class for each task."""
Task = Literal["text-generation-with-past", "feature-extraction", "image-classification", "text-classification"]
TASKS = {
    "decoder": ("text-generation-with-past",), "encoder": ("feature-extraction", "text-classification"),
    "vision encoder": ("feature-extraction", "image-classification"),
}  # fmt: skip
"""What each kind can do."""
RUNTIME_INPUTS = re.compile(r"(input_ids|attention_mask|token_type_ids|position_ids|pixel_values|past_key_values\..*)$")
"""What a model is fed; every other input of an exported graph is a weight."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies are the same for every length."""


class Export(Options):
    """How the checkpoint becomes ONNX."""

    task: Task = "text-generation-with-past"
    """optimum's name of what the model does: decoders generate text, encoders extract features or classify."""
    opset: Literal[18, 20, 21] = 18
    """ONNX operator set of the graph."""


def export_graph(checkpoint: Checkpoint, options: Export, path: Path) -> None:
    """Write the graph of `checkpoint` to `path`: weights are inputs named as in the checkpoint.

    Raises:
        ExportError: the architecture is not supported, or transformers would read the config wrongly.
    """
    check_config(checkpoint, options)
    # heavy, and only an export needs them
    import torch
    import transformers
    from optimum.exporters.onnx import convert
    from optimum.exporters.tasks import TasksManager

    from pipeline.dense_experts import dense_experts
    from pipeline.weightless import empty_parameters, weightless_export

    decoder = options.task == "text-generation-with-past"
    noise = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(noise), contextlib.redirect_stderr(noise):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            try:
                config = transformers_config(checkpoint)
                # convolutions of the meta device cannot be traced; models of images are small
                with contextlib.nullcontext() if config.model_type in VISION else empty_parameters():
                    model = getattr(transformers, MODELS[options.task]).from_config(config, dtype=torch.float32).eval()
            except Exception as error:  # whatever transformers raises for numbers that make no model
                what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                where = checkpoint.folder / "config.json"
                raise ExportError(f"{where}: transformers cannot build the model that it describes: {what}") from error
            build = TasksManager.get_exporter_config_constructor(
                "onnx", model=model, task=options.task, library_name="transformers"
            )
            past = {"use_past": True, "use_past_in_inputs": True} if decoder else {}
            with weightless_export(), dense_experts() if config.model_type == "qwen3_moe" else contextlib.nullcontext():
                convert.export(model, build(model.config, **past), path, opset=options.opset, do_constant_folding=False)
        finally:
            logging.disable(logging.NOTSET)


def check_config(checkpoint: Checkpoint, options: Export) -> None:
    """Refuse what cannot be exported before anything heavy is loaded.

    Raises:
        ExportError: unsupported `model_type`, a task that does not fit it, or RoPE settings that transformers 4 lacks.
    """
    config = checkpoint.config
    where = checkpoint.folder / "config.json"
    kind = config.get("model_type")
    if kind not in SUPPORTED:
        raise ExportError(f"{where}: model_type '{kind}' is not supported. Supported: {', '.join(sorted(SUPPORTED))}.")
    fitting = TASKS[SUPPORTED[kind]]
    if options.task not in fitting:
        raise ExportError(f"{where}: '{kind}' is a {SUPPORTED[kind]}; set export: {{task: {' or '.join(fitting)}}}.")
    _check_dimensions(config, where)
    scaling = translated(config, where).get("rope_scaling") or {}
    rope = scaling.get("rope_type", scaling.get("type", "default"))
    if rope not in ROPE_TYPES:
        raise ExportError(
            f"{where}: RoPE of the type '{rope}' changes its frequencies with the length of the text, which a graph cannot. "
            f"Supported: {', '.join(ROPE_TYPES)}."
        )


DIMENSIONS = {
    "hidden_size": 1 << 17, "intermediate_size": 1 << 20, "num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12, "vocab_size": 1 << 24, "max_position_embeddings": 1 << 26,
}  # fmt: skip
"""The largest that anybody has made, and some times more."""


def _check_dimensions(config: dict[str, Any], where: Path) -> None:
    """Refuse numbers that describe no model, before something of their size is made."""
    for name, largest in DIMENSIONS.items():
        value = config.get(name)
        if value is not None and not (type(value) is int and 1 <= value <= largest):
            raise ExportError(f"{where}: {name} is {value!r}; expected a number from 1 to {largest:,}.")


def check_layers(checkpoint: Checkpoint) -> None:
    """Refuse a configuration of more layers than there are weights for; they would all be traced first.

    Raises:
        ExportError, CheckpointError: the two files belong to different models, or the weights are damaged.
    """
    layers = {int(found.group(1)) for name in checkpoint.weights if (found := LAYER.search(name))}
    described = checkpoint.config.get("num_hidden_layers")
    if layers and described is not None and described > len(layers):
        where = checkpoint.folder / "config.json"
        raise ExportError(f"{where}: num_hidden_layers is {described}, the weights have {len(layers)} layers.")


def bind(graph: gs.Graph, checkpoint: Checkpoint) -> None:
    """Replace every weight input of an exported graph by a lazy constant of the checkpoint.

    Weights keep the checkpoint's dtype; where that is not float32, a Cast widens them.

    Raises:
        ExportError: a weight is missing, or its shape is not the one that the config describes.
    """
    kept, missing = [], []
    wanted = [tensor for tensor in graph.inputs if _is_weight(tensor)]
    prefix = _common_prefix({t.name for t in wanted}, set(checkpoint.weights))
    for tensor in graph.inputs:
        if not _is_weight(tensor):
            kept.append(tensor)
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
    graph.inputs = kept


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
        node.inputs = [wide if one is tensor else one for one in node.inputs]


def load_graph(path: Path, checkpoint: Checkpoint) -> gs.Graph:
    """The exported graph at `path` with its weights bound to `checkpoint`, or an ONNX file's own."""
    if isinstance(checkpoint, OnnxModel):
        return checkpoint.graph()
    graph = gs.import_onnx(onnx.load(str(path), load_external_data=False))
    graph.name = "model"
    bind(graph, checkpoint)
    return graph


def is_decoder(checkpoint: Checkpoint, options: Export) -> bool:
    """Whether the graph generates text, with its own cache."""
    return options.task == "text-generation-with-past" and not isinstance(checkpoint, OnnxModel)


def describe(checkpoint: Checkpoint) -> str:
    """One line about the model, for people."""
    if isinstance(checkpoint, OnnxModel):
        return f"{checkpoint.file.name}, {len(checkpoint.weights)} weights"
    config = checkpoint.config
    return f"{config.get('model_type')}, {config.get('num_hidden_layers')} layers, hidden {config.get('hidden_size')}"
