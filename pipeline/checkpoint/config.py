"""config.json -> what transformers 4 wants of it, also where transformers 5 wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import ExportError


def transformers_config(checkpoint: Checkpoint) -> Any:
    """The configuration object of a checkpoint, its RoPE settings where this version of transformers looks for them.

    Raises:
        ExportError: the settings are none that it knows.
    """
    from transformers import CONFIG_MAPPING  # heavy

    config = translated(checkpoint.config, checkpoint.folder / "config.json")
    return CONFIG_MAPPING[config["model_type"]].from_dict(config)


def sliding_windows(checkpoint: Checkpoint) -> tuple[int, ...]:
    """How many tokens each layer attends to, -1 for all of them; empty where every layer attends to all."""
    config = checkpoint.config
    window, longest = config.get("sliding_window"), config.get("max_position_embeddings")
    if window is None or (longest is not None and window >= longest):
        return ()
    if not config.get("use_sliding_window", config.get("model_type") not in ("qwen2", "qwen3")):
        return ()
    kinds = config.get("layer_types") or getattr(transformers_config(checkpoint), "layer_types", None)
    if kinds is None:
        return (int(window),) * int(config["num_hidden_layers"])
    windows = tuple(int(window) if kind == "sliding_attention" else -1 for kind in kinds)
    return () if set(windows) == {-1} else windows


def translated(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """Move `rope_parameters` (transformers 5) to `rope_theta` and `rope_scaling` (transformers 4, which ignores the former).

    Raises:
        ExportError: they are of a shape that cannot be moved.
    """
    moved = dict(config)
    if (rope := moved.pop("rope_parameters", None)) is None:
        return moved
    if not isinstance(rope, dict):
        raise ExportError(f"{where}: rope_parameters is {rope!r}, expected a mapping.")
    if set(rope) == {"full_attention", "sliding_attention"} and config.get("model_type") == "gemma3_text":
        local = rope["sliding_attention"]
        if not isinstance(local, dict) or local.get("rope_type", "default") != "default":
            raise ExportError(f"{where}: the RoPE of sliding layers is {local!r}; transformers 4 knows only the default there.")
        moved["rope_local_base_freq"] = local.get("rope_theta")
        rope = rope["full_attention"]
    if not isinstance(rope, dict) or not isinstance(rope.get("rope_theta"), int | float):
        raise ExportError(f"{where}: rope_parameters is {rope!r}; expected rope_theta in it, and rope_type with its settings.")
    moved["rope_theta"] = rope["rope_theta"]
    if "partial_rotary_factor" in rope:
        moved["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    moved["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    return moved
