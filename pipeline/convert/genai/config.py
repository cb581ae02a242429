"""A checkpoint and its fused graph -> what onnxruntime-genai reads beside the model: how to run it, and its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs

from lowbit.pipeline.checkpoint.chat_template import chat_template
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import stop_ids
from lowbit.pipeline.onnx_io.writer import MODEL

CONFIG, TOKENIZER_CONFIG = "genai_config.json", "tokenizer_config.json"
KINDS = ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo", "phi3", "qwen2", "qwen3", "smollm3")
"""Decoders that onnxruntime-genai 0.18 has a name for; any other is "decoder" to it."""
SAMPLING = ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
"""Options of generation_config.json that go by the same names here."""


def write_config(checkpoint: Checkpoint, graph: gs.Graph, folder: Path) -> None:
    """Write genai_config.json for a graph with GroupQueryAttention."""
    config, generation = checkpoint.config, checkpoint.read_json("generation_config.json")
    tokens = {name: generation.get(name, config.get(name)) for name in ("bos_token_id", "pad_token_id")}
    model = {
        "type": config["model_type"] if config["model_type"] in KINDS else "decoder",
        "vocab_size": config["vocab_size"],
        "context_length": config["max_position_embeddings"],
        "eos_token_id": stop_ids(checkpoint),
        **{name: token for name, token in tokens.items() if token is not None},
        "decoder": _decoder(graph, config["hidden_size"]),
    }
    search: dict[str, Any] = {name: generation[name] for name in SAMPLING if name in generation}
    search |= {"max_length": config["max_position_embeddings"], "past_present_share_buffer": True}
    (folder / CONFIG).write_text(json.dumps({"model": model, "search": search}, indent=2), "utf-8")


def write_side_files(checkpoint: Checkpoint, folder: Path) -> None:
    """Copy the checkpoint's tokenizer and configuration, the tokenizer's with what its reader asks for there."""
    for name, file in checkpoint.side_files().items():
        shutil.copyfile(file, folder / name)
    write_tokenizer_config(checkpoint, folder)


def write_tokenizer_config(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint's tokenizer_config.json with a class by name, and the chat template."""
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **checkpoint.read_json(TOKENIZER_CONFIG)}
    if template := chat_template(checkpoint):
        config["chat_template"] = template
    (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")


def _decoder(graph: gs.Graph, hidden_size: int) -> dict[str, Any]:
    """The shape of the model, and what its inputs and outputs are called."""
    past = next(tensor for tensor in graph.inputs if tensor.name == "past_key_values.0.key").shape
    attentions = [node for node in graph.nodes if node.op == "GroupQueryAttention"]
    return {
        "filename": MODEL,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": past[3],
        "hidden_size": hidden_size,
        "num_attention_heads": attentions[0].attrs["num_heads"],
        "num_key_value_heads": past[1],
        "num_hidden_layers": len(attentions),
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
