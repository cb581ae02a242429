"""A quantized graph -> a folder that onnxruntime-genai opens: attention and norms in one operator each, the same codes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import onnx_graphsurgeon as gs

from lowbit.passes.lowering.fuse_attention import FuseAttention
from lowbit.passes.lowering.fuse_norm import FuseNorm
from lowbit.pipeline.checkpoint.config import sliding_windows
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.base import PROBE, Proof, Target, check_lowered
from lowbit.pipeline.convert.compare_engines import compare_runtimes
from lowbit.pipeline.convert.engine_process import ask_engine
from lowbit.pipeline.convert.genai.chat import GenaiChat
from lowbit.pipeline.convert.genai.config import write_config, write_side_files
from lowbit.pipeline.convert.genai.options import GenaiOptions
from lowbit.pipeline.convert.genai.proof import prove
from lowbit.pipeline.convert.genai.sizes import GenaiSizes
from lowbit.pipeline.convert.genai.weights import write_weights
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.writer import DATA, MODEL
from lowbit.pipeline.report.engine_quality import EngineOnText
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import decoder_feeds

WORKER = "lowbit.pipeline.convert.genai.llm_worker"


class OnnxruntimeGenai(Target[GenaiOptions]):
    """`target: onnxruntime-genai`: token ids in, text out, by onnxruntime's kernels and onnxruntime-genai's loop."""

    label = "genai"
    modes: ClassVar = {"accuracy_level_0": "float arithmetic", "as_run": "as it runs"}
    weight_files = (DATA,)
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
        write_weights(self.graph, model_file, folder, self.options.three_bit == "folded", progress)
        write_config(self.checkpoint, self.graph, folder)
        write_side_files(self.checkpoint, folder)
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
        return compare_runtimes("onnxruntime-genai", ask, model_file, samples, self.checkpoint, self.new_tokens)

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
