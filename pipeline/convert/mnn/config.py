"""A checkpoint and its lowered graph -> config.json (how MNN runs it) and llm_config.json (what it is)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from lowbit.passes.graph.lowered_ops import ROPES
from lowbit.pipeline.checkpoint.chat_template import chat_template
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.mnn.embedding import Embedding
from lowbit.pipeline.errors import ConvertError

MODEL, WEIGHTS, TOKENIZER = "llm.mnn", "llm.mnn.weight", "tokenizer.mtok"
SAMPLING = ("temperature", "top_k", "top_p", "repetition_penalty")
"""Options of generation_config.json that go by the same names in MNN."""


@dataclass(frozen=True)
class Attention:
    """What MNN wants to be the same in all layers, and how many there are."""

    scale: float
    head_dim: int
    layers: int


def attention_of(graph: gs.Graph) -> Attention:
    """The attention of a lowered graph.

    Raises:
        ConvertError: layers differ.
    """
    attentions = [node for node in graph.nodes if node.op == "Attention"]
    scales = {node.attrs["scale"] for node in attentions}
    head_dims = {node.attrs["q_shape"][3] for node in graph.nodes if node.op in ROPES}
    if len(scales) != 1 or len(head_dims) != 1:
        raise ConvertError("layers differ in attention scale or head size; MNN has one for all.")
    return Attention(scales.pop(), head_dims.pop(), len(attentions))


def write_configs(checkpoint: Checkpoint, embedding: Embedding, attention: Attention, folder: Path) -> None:
    """Write both files into `folder`."""
    model: dict[str, Any] = {
        "model_type": checkpoint.config["model_type"], "hidden_size": embedding.hidden, "layer_nums": attention.layers,
        "attention_mask": "float", "attention_type": "full", "is_mrope": False, **embedding.config,
    }  # fmt: skip
    if abs(attention.scale * attention.head_dim**0.5 - 1) > 1e-5:
        model["attn_scale"] = attention.scale
    run = {
        "llm_model": MODEL, "llm_weight": WEIGHTS, "tokenizer_file": TOKENIZER, "embedding_file": embedding.file,
        "backend_type": "cpu", "thread_num": 4, "precision": "low", "memory": "low",
        "use_template": bool(chat_template(checkpoint)), **_sampling(checkpoint),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(run, indent=2), "utf-8")
    (folder / "llm_config.json").write_text(json.dumps(model, indent=2), "utf-8")


def _sampling(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's own way of choosing tokens, in MNN's words."""
    generation = checkpoint.read_json("generation_config.json")
    if not generation.get("do_sample"):
        return {"sampler_type": "greedy"}
    return {"sampler_type": "mixed"} | {name: generation[name] for name in SAMPLING if name in generation}
