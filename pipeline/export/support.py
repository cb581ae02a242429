"""A configuration -> whether its model can be exported; everything else is refused before anything heavy is loaded."""

from __future__ import annotations

import re

from lowbit.pipeline.checkpoint.config import translated
from lowbit.pipeline.checkpoint.config_schema import checked_config
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.onnx_model import OnnxModel
from lowbit.pipeline.errors import ExportError
from lowbit.pipeline.recipe.sections import Export

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
TASKS = {
    "decoder": ("text-generation-with-past",), "encoder": ("feature-extraction", "text-classification"),
    "vision encoder": ("feature-extraction", "image-classification"),
}  # fmt: skip
"""What each kind can do."""

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Those whose frequencies are the same for every length."""

LAYERS = re.compile(r"layers?\.(\d+)\.")
NUMBERED = {"num_hidden_layers": LAYERS, "n_layers": LAYERS, "num_experts": re.compile(r"\.experts\.(\d+)\.")}
"""What configurations count, and its number in names of weights."""
WIDTHS = ("hidden_size", "dim", "intermediate_size", "hidden_dim", "moe_intermediate_size", "patch_size")
"""What some weight has as many rows or columns as."""


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
    scaling = checked_config(translated(config, where), where).get("rope_scaling") or {}
    rope = scaling.get("rope_type", scaling.get("type", "default"))
    if rope not in ROPE_TYPES:
        raise ExportError(
            f"{where}: RoPE of the type '{rope}' changes its frequencies with the length of the text, which a graph cannot. "
            f"Supported: {', '.join(ROPE_TYPES)}."
        )


def check_layers(checkpoint: Checkpoint) -> None:
    """Refuse a configuration of more layers or width than there are weights for, which would be made first, or of fewer layers.

    Raises:
        ExportError, CheckpointError: the two files belong to different models, or the weights are damaged.
    """
    where = checkpoint.folder / "config.json"
    for option, pattern in NUMBERED.items():
        numbers = {int(part.group(1)) for name in checkpoint.weights if (part := pattern.search(name))}
        described = checkpoint.config.get(option)
        if numbers and described is not None and (len(numbers), max(numbers) + 1) != (described, described):
            kind = "experts" if option == "num_experts" else "layers"
            raise ExportError(f"{where}: {option} is {described}, the weights have {len(numbers)} {kind}.")
    widest = max((size for weight in checkpoint.weights.values() for size in weight.shape), default=0)
    for option in WIDTHS if checkpoint.config.get("model_type") in VISION else (*WIDTHS, "vocab_size"):
        if (described := checkpoint.config.get(option, 0)) > widest:
            raise ExportError(f"{where}: {option} is {described}, no weight has more than {widest} rows or columns.")


def is_decoder(checkpoint: Checkpoint, options: Export) -> bool:
    """Whether the graph generates text, with its own cache."""
    return options.task == "text-generation-with-past" and not isinstance(checkpoint, OnnxModel)


def describe(checkpoint: Checkpoint) -> str:
    """One line about the model, for people."""
    if isinstance(checkpoint, OnnxModel):
        return f"{checkpoint.file.name}, {len(checkpoint.weights)} weights"
    config = checkpoint.config
    return f"{config.get('model_type')}, {config.get('num_hidden_layers')} layers, hidden {config.get('hidden_size')}"
