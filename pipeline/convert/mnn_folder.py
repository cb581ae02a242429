"""A quantized graph -> a folder that MNN's LLM runtime opens, compared and proven at every step."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from passes._decoder import find_linears
from passes._lowered_ops import ROPES
from passes._weights import weight_of
from passes.lower_attention import LowerAttention
from passes.lower_interface import LowerInterface
from passes.lower_linear import LowerLinear
from passes.lower_norm import LowerNorm
from pipeline.checkpoint import Checkpoint
from pipeline.convert.mnn_embedding import Embedding, embedding_table, find_embedding
from pipeline.convert.mnn_graph import write_mnn
from pipeline.convert.mnn_tokenizer import chat_template, tokenizer_bytes
from pipeline.convert.mnn_weights import lay_out
from pipeline.errors import ConvertError
from pipeline.onnx_weights import read_layers
from pipeline.recipe import Convert
from pipeline.segments import Segments
from pipeline.sessions import decoder_feeds, load_model, set_accuracy_level

MODEL, WEIGHTS = "llm.mnn", "llm.mnn.weight"
LOWERING_TOLERANCE = 1e-5
"""Largest relative difference of logits between the quantized graph and the lowered one, both float32."""


@dataclass(frozen=True)
class Lowered:
    """A graph as MNN wants it, and how far its logits are from those of the quantized graph (relative error)."""

    graph: gs.Graph
    embedding: Embedding
    error: float


def lower(graph: gs.Graph, model_file: Path, options: Convert, probe: np.ndarray) -> Lowered:
    """Lower `graph`, which `model_file` was written from, in place, and run it beside that in onnxruntime.

    Args:
        probe: token ids int64 [tokens] to compare the two on.

    Raises:
        PassError: the graph is not one that can be lowered.
        ConvertError: the lowered graph computes something else.
    """
    embedding = find_embedding(graph, read_layers(model_file), options.scale_dtype)
    for lowering in (LowerNorm(), LowerAttention(), LowerInterface()):
        lowering.apply(graph)
    return Lowered(graph, embedding, _check_lowered(graph, model_file, embedding, probe))


def hand_off(
    lowered: Lowered,
    model_file: Path,
    checkpoint: Checkpoint,
    options: Convert,
    folder: Path,
    scratch: Path,
    progress: Callable[[float], None],
) -> tuple[str, ...]:
    """Fill `folder` for MNN's LLM runtime; returns remarks.

    Raises:
        ConvertError: MNN refuses the graph, or a scale does not fit the dtype.
    """
    graph, embedding, stored = lowered.graph, lowered.embedding, read_layers(model_file)
    linears = find_linears(graph)
    placed = lay_out([(stored[name], _bias(one.bias)) for name, one in linears.items()], options.scale_dtype)
    scales = {node.attrs["scale"] for node in graph.nodes if node.op == "Attention"}
    head_dims = {node.attrs["q_shape"][3] for node in graph.nodes if node.op in ROPES}
    outcome = LowerLinear().apply(graph)
    with (folder / WEIGHTS).open("wb") as stream:
        for i, layer in enumerate(placed):
            layer.write(stream)
            progress((i + 1) / len(placed))
    write_mnn(graph, {one.layer.name: one for one in placed}, folder / MODEL, scratch)
    embedding.write(folder)
    (folder / "tokenizer.mtok").write_bytes(tokenizer_bytes(checkpoint))
    _write_configs(checkpoint, embedding, scales, head_dims, _layers(graph), folder)
    return outcome.notes


def rehearse(graph: gs.Graph, checkpoint: Checkpoint) -> None:
    """Refuse now, before any weight is read, what `hand_off` would refuse: lowers `graph` in place.

    Raises:
        PassError, ConvertError: what MNN cannot hold.
    """
    _check_windows(checkpoint)
    embedding_table(graph)
    for lowering in (LowerNorm(), LowerAttention(), LowerInterface(), LowerLinear()):
        lowering.apply(graph)
    tokenizer_bytes(checkpoint)


def _check_windows(checkpoint: Checkpoint) -> None:
    """Attention to the last tokens alone is in the exported mask, which MNN's attention does not read."""
    config = checkpoint.config
    window = config.get("sliding_window")
    kinds = set(config.get("layer_types") or ())
    used = config.get("use_sliding_window", config.get("model_type") not in ("qwen2", "qwen3"))
    if window is None or (kinds and "sliding_attention" not in kinds) or (not kinds and not used):
        return
    if window < int(config.get("max_position_embeddings", window + 1)):
        raise ConvertError(
            f"{checkpoint.folder / 'config.json'}: attends to a sliding window of {window} tokens; only full causal attention "
            "is handed to MNN."
        )


def _bias(constant: gs.Constant | None) -> np.ndarray | None:
    return None if constant is None else weight_of(constant).load().astype(np.float32)


def _layers(graph: gs.Graph) -> int:
    return sum(node.op == "Attention" for node in graph.nodes)


def _check_lowered(graph: gs.Graph, model_file: Path, embedding: Embedding, ids: np.ndarray) -> float:
    """Run the lowered graph beside the quantized one in onnxruntime; returns their relative difference."""
    model = gs.export_onnx(graph)
    places = {t.name: t for t in onnx.load(str(model_file), load_external_data=False).graph.initializer}
    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            tensor.CopyFrom(places[tensor.name])
    set_accuracy_level(model, 0)
    lowered, quantized = gs.import_onnx(model), gs.import_onnx(load_model(model_file, accuracy_level=0))
    expected = _logits(quantized, model_file.parent, decoder_feeds(quantized, ids[None]))
    count = len(ids)
    feeds = {
        "input_ids": embedding.look_up(ids)[:, None],
        "attention_mask": np.triu(np.full((1, 1, count, count), np.finfo(np.float32).min, np.float32), 1),
        "position_ids": np.arange(count, dtype=np.int32)[None],
        "logits_index": np.array([0], np.int32),
    }
    found = _logits(lowered, model_file.parent, feeds)
    error = relative_error(found, expected)
    if not error <= LOWERING_TOLERANCE:
        raise ConvertError(
            f"the lowered graph computes other logits than the quantized one: relative difference {error:.1e}, "
            f"at most {LOWERING_TOLERANCE:.0e} is rounding. This is a bug in a lowering pass."
        )
    return error


def _logits(graph: gs.Graph, folder: Path, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """Logits of one run, block by block."""
    return next(Segments(graph, folder, "logits").run([feeds], lambda done: None))


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """|found - expected| / |expected| in the Euclidean norm over all elements."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _write_configs(
    checkpoint: Checkpoint, embedding: Embedding, scales: set[float], head_dims: set[int], layers: int, folder: Path
) -> None:
    """config.json (how to run) and llm_config.json (what it is)."""
    if len(scales) != 1 or len(head_dims) != 1:
        raise ConvertError("layers differ in attention scale or head size; MNN has one for all.")
    model: dict[str, Any] = {
        "model_type": checkpoint.config["model_type"], "hidden_size": embedding.hidden, "layer_nums": layers,
        "attention_mask": "float", "attention_type": "full", "is_mrope": False, **embedding.config,
    }  # fmt: skip
    (scale,), (head_dim,) = scales, head_dims
    if abs(scale * head_dim**0.5 - 1) > 1e-5:
        model["attn_scale"] = scale
    run = {
        "llm_model": MODEL, "llm_weight": WEIGHTS, "tokenizer_file": "tokenizer.mtok", "embedding_file": embedding.file,
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
    keys = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "repetition_penalty": "repetition_penalty"}
    return {"sampler_type": "mixed"} | {theirs: generation[ours] for ours, theirs in keys.items() if ours in generation}
