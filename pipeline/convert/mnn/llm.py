"""A quantized graph -> a folder that MNN's LLM runtime opens, compared and proven at every step."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.graph.decoder import find_linears
from lowbit.passes.graph.lowered_ops import ROPES
from lowbit.passes.lowering.lower_attention import LowerAttention
from lowbit.passes.lowering.lower_interface import LowerInterface
from lowbit.passes.lowering.lower_linear import LowerLinear
from lowbit.passes.lowering.lower_norm import LowerNorm
from lowbit.passes.quant.weights import weight_of
from lowbit.pipeline.checkpoint.chat_template import chat_template
from lowbit.pipeline.checkpoint.config import sliding_windows
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.base import PROBE, Proof, Target, check_lowered
from lowbit.pipeline.convert.compare_engines import compare_runtimes
from lowbit.pipeline.convert.engine_process import ask_engine
from lowbit.pipeline.convert.mnn.chat import MnnChat
from lowbit.pipeline.convert.mnn.embedding import Embedding, embedding_table, find_embedding
from lowbit.pipeline.convert.mnn.llm_graph import write_mnn
from lowbit.pipeline.convert.mnn.options import MODES, MnnLlmOptions
from lowbit.pipeline.convert.mnn.proof import prove_llm
from lowbit.pipeline.convert.mnn.sizes import MnnLlmSizes
from lowbit.pipeline.convert.mnn.tokenizer import tokenizer_bytes
from lowbit.pipeline.convert.mnn.weights import lay_out
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.reader import read_layers
from lowbit.pipeline.report.engine_quality import EngineOnText
from lowbit.pipeline.runtime.partition import Feeds

WORKER = "lowbit.pipeline.convert.mnn.llm_worker"
MODEL, WEIGHTS = "llm.mnn", "llm.mnn.weight"


class MnnLlm(Target[MnnLlmOptions]):
    """`target: mnn-llm`: token ids in, text out, with MNN's own tokenizer, cache and sampling."""

    label = "MNN"
    modes = MODES
    packages = ("MNN",)
    sources = (WORKER,)
    usage = """\
import MNN.llm as llm

model = llm.create("mnn/config.json")
model.load()
print(model.response("Hello"))"""

    graph: gs.Graph
    embedding: Embedding

    def sizes(self) -> MnnLlmSizes:
        return MnnLlmSizes(self.checkpoint, self.options.scale_dtype)

    def rehearse(self, graph: gs.Graph) -> None:
        _check_windows(self.checkpoint)
        embedding_table(graph)
        for lowering in (LowerNorm(), LowerAttention(), LowerInterface(), LowerLinear()):
            lowering.apply(graph)
        tokenizer_bytes(self.checkpoint)

    def lower(self, graph: gs.Graph, model_file: Path, samples: list[Feeds]) -> float:
        probe = samples[0]["input_ids"][0, :PROBE]
        self.graph, self.embedding = graph, find_embedding(graph, read_layers(model_file), self.options.scale_dtype)
        for lowering in (LowerNorm(), LowerAttention(), LowerInterface()):
            lowering.apply(graph)
        count = len(probe)
        feeds = {
            "input_ids": self.embedding.look_up(probe)[:, None],
            "attention_mask": np.triu(np.full((1, 1, count, count), np.finfo(np.float32).min, np.float32), 1),
            "position_ids": np.arange(count, dtype=np.int32)[None],
            "logits_index": np.array([0], np.int32),
        }
        return check_lowered(graph, model_file, probe, feeds)

    def write(self, model_file: Path, folder: Path, scratch: Path, progress: Callable[[float], None]) -> tuple[str, ...]:
        graph, stored = self.graph, read_layers(model_file)
        linears = find_linears(graph)
        placed = lay_out([(stored[name], _bias(one.bias)) for name, one in linears.items()], self.options.scale_dtype)
        scales = {node.attrs["scale"] for node in graph.nodes if node.op == "Attention"}
        head_dims = {node.attrs["q_shape"][3] for node in graph.nodes if node.op in ROPES}
        outcome = LowerLinear().apply(graph)
        with (folder / WEIGHTS).open("wb") as stream:
            for i, layer in enumerate(placed):
                layer.write(stream)
                progress((i + 1) / len(placed))
        write_mnn(graph, {one.layer.name: one for one in placed}, folder / MODEL, scratch)
        self.embedding.write(folder)
        (folder / "tokenizer.mtok").write_bytes(tokenizer_bytes(self.checkpoint))
        _write_configs(self.checkpoint, self.embedding, scales, head_dims, _layers(graph), folder)
        return outcome.notes

    @staticmethod
    def prove(model_file: Path, folder: Path, scratch: Path) -> Proof:
        return prove_llm(model_file, folder, folder / MODEL, scratch)

    def compare(self, model_file: Path, folder: Path, samples: list[Feeds], scratch: Path) -> EngineOnText:
        settings = {f"memory_{memory}": {"memory": memory, "precision": "high"} for memory in ("high", "low")}
        ask = partial(ask_engine, "MNN", WORKER, folder, settings, scratch)
        return compare_runtimes("MNN", ask, model_file, samples, self.checkpoint)

    @classmethod
    def chat(cls, folder: Path, checkpoint: Checkpoint) -> MnnChat:
        return MnnChat(folder, checkpoint)


def _check_windows(checkpoint: Checkpoint) -> None:
    """Attention to the last tokens alone: MNN 3.6.1 with `attention_type: sliding` computes other logits than onnxruntime."""
    if windows := sliding_windows(checkpoint):
        raise ConvertError(
            f"{checkpoint.folder / 'config.json'}: attends to a sliding window of {max(windows)} tokens; only full causal "
            "attention is handed to MNN."
        )


def _bias(constant: gs.Constant | None) -> np.ndarray | None:
    return None if constant is None else weight_of(constant).load().astype(np.float32)


def _layers(graph: gs.Graph) -> int:
    return sum(node.op == "Attention" for node in graph.nodes)


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
