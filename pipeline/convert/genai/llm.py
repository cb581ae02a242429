"""A quantized graph -> a folder that onnxruntime-genai opens: attention and norms in one operator each, the same codes."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.lowering.fuse_attention import FuseAttention
from lowbit.passes.lowering.fuse_norm import FuseNorm
from lowbit.passes.lowering.pack_projections import PackProjections
from lowbit.passes.quant.quantized_weight import Part
from lowbit.passes.quant.weights import ArrayWeight, StackedWeight, Weight, rows_per_chunk
from lowbit.pipeline.checkpoint.chat_template import chat_template
from lowbit.pipeline.checkpoint.config import sliding_windows
from lowbit.pipeline.checkpoint.huggingface import SIDE_FILES, Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import stop_ids
from lowbit.pipeline.convert.base import PROBE, Proof, Target, check_lowered
from lowbit.pipeline.convert.compare_engines import compare_runtimes
from lowbit.pipeline.convert.engine_process import ask_engine
from lowbit.pipeline.convert.genai.chat import GenaiChat
from lowbit.pipeline.convert.genai.options import GenaiOptions
from lowbit.pipeline.convert.genai.proof import prove
from lowbit.pipeline.convert.genai.sizes import GenaiSizes
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.reader import region
from lowbit.pipeline.onnx_io.stored_layer import Region
from lowbit.pipeline.onnx_io.writer import DATA, MODEL, DataFile, exported, external_weights, write_model
from lowbit.pipeline.report.engine_quality import EngineOnText
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import decoder_feeds, load_model
from lowbit.pipeline.runtime.three_bits import as_four_bits, expanded

CONFIG, TOKENIZER_CONFIG = "genai_config.json", "tokenizer_config.json"
KINDS = ("gemma", "gemma2", "gemma3_text", "granite", "llama", "mistral", "olmo", "phi3", "qwen2", "qwen3", "smollm3")
"""Decoders that onnxruntime-genai 0.18 has a name for; any other is "decoder" to it."""
WORKER = "lowbit.pipeline.convert.genai.llm_worker"
INLINE_BYTES = 1 << 16
"""Larger constants than this go into the data file."""


class OnnxruntimeGenai(Target[GenaiOptions]):
    """`target: onnxruntime-genai`: token ids in, text out, by onnxruntime's kernels and onnxruntime-genai's loop."""

    label = "genai"
    modes: ClassVar = {"accuracy_level_0": "float arithmetic", "as_run": "as it runs"}
    packages = ("onnxruntime-genai",)
    sources = (WORKER,)
    usage = """\
import onnxruntime_genai as genai

model = genai.Model("genai")"""

    graph: gs.Graph

    def sizes(self) -> GenaiSizes:
        return GenaiSizes(self.checkpoint, folded=self.options.three_bit == "folded")

    def rehearse(self, graph: gs.Graph) -> None:
        self._fuse(graph)

    def lower(self, graph: gs.Graph, model_file: Path, samples: list[Feeds]) -> float:
        probe = samples[0]["input_ids"][0, :PROBE]
        self.graph = graph
        self._fuse(graph)
        return check_lowered(graph, model_file, probe, decoder_feeds(graph, probe[None]))

    def write(self, model_file: Path, folder: Path, scratch: Path, progress: Callable[[float], None]) -> tuple[str, ...]:
        PackProjections().apply(self.graph)
        for tensor in self.graph.tensors().values():
            inline = tensor._values if isinstance(tensor, gs.Constant) else None
            if isinstance(inline, np.ndarray) and inline.nbytes > INLINE_BYTES:  # rotary tables
                tensor.values = ArrayWeight(inline)
        quantized = load_model(model_file)
        model = exported(self.graph, {entry.key: entry.value for entry in quantized.metadata_props})
        shapes = as_four_bits(model) if self.options.three_bit == "folded" else {}
        stored = {tensor.name: tensor for tensor in quantized.graph.initializer}
        weights = external_weights(self.graph)
        data = DataFile(folder / DATA)
        for done, (name, weight) in enumerate(weights.items()):
            size = int(np.prod(shapes[name])) if name in shapes else weight.nbytes
            read = expanded if name in shapes else _rows
            if isinstance(weight, ArrayWeight):
                pieces: Iterable[np.ndarray] = [weight.array]
            else:
                pieces = (piece for part in _stacked(name, weight) for piece in read(region(model_file, stored[part])))
            data.append(name, size, (np.ascontiguousarray(piece).view(np.uint8).data.cast("B") for piece in pieces))
            progress((done + 1) / len(weights))
        data.close()
        for tensor in model.graph.initializer:
            if tensor.name in shapes:
                tensor.dims[:] = shapes[tensor.name]
        write_model(model, folder / MODEL, {name: data.places[name] for name in weights})
        self._write_config(folder)
        for name in SIDE_FILES:
            if (file := self.checkpoint.folder / name).exists():
                shutil.copyfile(file, folder / name)
        self._write_tokenizer_config(folder)
        return ()

    @staticmethod
    def prove(model_file: Path, folder: Path, scratch: Path) -> Proof:
        return prove(model_file, folder / MODEL)

    @staticmethod
    def missing() -> str | None:
        present = importlib.util.find_spec("onnxruntime_genai") is not None
        return None if present else "onnxruntime-genai is not installed: pip install 'lowbit[genai]'"

    def compare(self, model_file: Path, folder: Path, samples: list[Feeds], scratch: Path) -> EngineOnText:
        settings: dict[str, dict[str, int]] = {"accuracy_level_0": {"accuracy_level": 0}, "as_run": {}}
        ask = partial(ask_engine, "onnxruntime-genai", WORKER, folder, settings, scratch)
        return compare_runtimes("onnxruntime-genai", ask, model_file, samples, self.checkpoint)

    @classmethod
    def chat(cls, folder: Path, checkpoint: Checkpoint) -> GenaiChat:
        if reason := cls.missing():
            raise ConvertError(f"{reason}.")
        return GenaiChat(folder, checkpoint)

    def _fuse(self, graph: gs.Graph) -> None:
        length = self.checkpoint.config.get("max_position_embeddings")
        if not isinstance(length, int):
            raise ConvertError(
                f"{self.checkpoint.folder / 'config.json'}: max_position_embeddings is {length!r}, not a number."
            )
        for fusion in (FuseAttention(max_length=length, windows=sliding_windows(self.checkpoint)), FuseNorm()):
            fusion.apply(graph)

    def _write_config(self, folder: Path) -> None:
        config, generation = self.checkpoint.config, self.checkpoint.read_json("generation_config.json")
        inputs = {tensor.name: tensor for tensor in self.graph.inputs}
        attention = next(node for node in self.graph.nodes if node.op == "GroupQueryAttention")
        past = inputs["past_key_values.0.key"].shape

        tokens = {name: generation.get(name, config.get(name)) for name in ("bos_token_id", "pad_token_id")}
        model = {
            "type": config["model_type"] if config["model_type"] in KINDS else "decoder",
            "vocab_size": config["vocab_size"],
            "context_length": config["max_position_embeddings"],
            "eos_token_id": stop_ids(self.checkpoint),
            **{name: token for name, token in tokens.items() if token is not None},
            "decoder": {
                "filename": MODEL,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": past[3],
                "hidden_size": config["hidden_size"],
                "num_attention_heads": attention.attrs["num_heads"],
                "num_key_value_heads": past[1],
                "num_hidden_layers": sum(node.op == "GroupQueryAttention" for node in self.graph.nodes),
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
            },
        }
        search: dict[str, Any] = {
            name: generation[name]
            for name in ("do_sample", "temperature", "top_k", "top_p", "repetition_penalty")
            if name in generation
        }
        search |= {"max_length": config["max_position_embeddings"], "past_present_share_buffer": True}
        (folder / CONFIG).write_text(json.dumps({"model": model, "search": search}, indent=2), "utf-8")

    def _write_tokenizer_config(self, folder: Path) -> None:
        """The checkpoint's, with what its reader asks for there: a class by name, and the chat template."""
        config = {"tokenizer_class": "PreTrainedTokenizerFast", **self.checkpoint.read_json(TOKENIZER_CONFIG)}
        if template := chat_template(self.checkpoint):
            config["chat_template"] = template
        (folder / TOKENIZER_CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")


def _stacked(name: str, weight: Weight) -> list[str]:
    """The tensors of the quantized model whose rows make up the weight called `name`."""
    if isinstance(weight, StackedWeight):
        return [part for part, _ in weight.parts]
    if isinstance(weight, Part) and isinstance(weight.of.source, StackedWeight):
        return [f"{layer}.{weight.part}" for layer, _ in weight.of.source.parts]
    return [name]


def _rows(source: Region) -> Iterable[np.ndarray]:
    """A stored tensor from its first row to its last, a few megabytes at a time."""
    count = source.shape[0] if source.shape else 1
    step = rows_per_chunk(source.row_bytes)
    return (source.rows(start, min(start + step, count)) for start in range(0, count, step))
