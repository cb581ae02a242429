"""A quantized graph -> a folder that MNN's LLM runtime opens, compared and proven at every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from lowbit.passes.graph.decoder import find_linears
from lowbit.passes.lowering.lower_attention import LowerAttention
from lowbit.passes.lowering.lower_interface import LowerInterface
from lowbit.passes.lowering.lower_linear import LowerLinear
from lowbit.passes.lowering.lower_norm import LowerNorm
from lowbit.passes.quant.weights import weight_of
from lowbit.pipeline.checkpoint.config import sliding_windows
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.base import PROBE, Proof, Target, check_lowered
from lowbit.pipeline.convert.compare_engines import compare_runtimes
from lowbit.pipeline.convert.engine_process import ask_engine
from lowbit.pipeline.convert.mnn.chat import MnnChat
from lowbit.pipeline.convert.mnn.config import MODEL, TOKENIZER, WEIGHTS, attention_of, write_configs
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


class MnnLlm(Target[MnnLlmOptions]):
    """`target: mnn-llm`: token ids in, text out, with MNN's own tokenizer, cache and sampling."""

    label = "MNN"
    modes = MODES
    weight_files = (WEIGHTS,)
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
        attention = attention_of(graph)
        outcome = LowerLinear().apply(graph)
        with (folder / WEIGHTS).open("wb") as stream:
            for i, layer in enumerate(placed):
                layer.write(stream)
                progress((i + 1) / len(placed))
        write_mnn(graph, {one.layer.name: one for one in placed}, folder / MODEL, scratch)
        self.embedding.write(folder)
        (folder / TOKENIZER).write_bytes(tokenizer_bytes(self.checkpoint))
        write_configs(self.checkpoint, self.embedding, attention, folder)
        return outcome.notes

    @staticmethod
    def prove(model_file: Path, folder: Path, scratch: Path) -> Proof:
        return prove_llm(model_file, folder, folder / MODEL, scratch)

    def compare(self, model_file: Path, folder: Path, samples: list[Feeds], scratch: Path) -> EngineOnText:
        settings = {f"memory_{memory}": {"memory": memory, "precision": "high"} for memory in ("high", "low")}
        ask = partial(ask_engine, "MNN", WORKER, folder, settings, scratch)
        return compare_runtimes("MNN", ask, model_file, samples, self.checkpoint, self.new_tokens)

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


def _bias(constant: gs.Constant | None) -> npt.NDArray[np.float32] | None:
    return None if constant is None else weight_of(constant).load().astype(np.float32)
