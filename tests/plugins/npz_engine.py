"""A toy engine: the graph as it is, every weight in one .npz archive; onnxruntime runs it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime
from onnx import TensorProto

from lowbit.passes.base import PassError
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.base import PROBE, Proof, Target, check_lowered
from lowbit.pipeline.convert.chat_engine import OnnxEngine
from lowbit.pipeline.convert.compare_engines import compare_runtimes
from lowbit.pipeline.convert.engine_process import ask_engine
from lowbit.pipeline.convert.sizes import Sizes
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.reader import read_layers, region
from lowbit.pipeline.recipe.sections import Convert
from lowbit.pipeline.report.engine_quality import EngineOnText
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import decoder_feeds, load_model, open_session

MODEL, WEIGHTS, TOKENIZER = "graph.onnx", "weights.npz", "tokenizer.json"
HEADERS = 300
"""Bytes that an archive takes beside each array."""
WORKER = "tests.plugins.npz_worker"


class NpzOptions(Convert):
    """The folder `npz`."""

    folder: ClassVar[str] = "npz"

    compressed: bool = False
    """Zipped as well."""


class NpzSizes(Sizes):
    """Bytes of the archive."""

    def weight(self, weight: QuantizedWeight) -> int:
        return super().weight(weight) + HEADERS * len(weight.parts)


class Npz(Target[NpzOptions]):
    """Weights by name, as they lie in the ONNX file."""

    label = "NumPy"
    modes: ClassVar = {"exact": "float arithmetic", "as_stored": "as stored"}
    weight_files = (WEIGHTS,)
    packages = ("numpy",)
    sources = (WORKER,)
    usage = 'import numpy\n\nnumpy.load("npz/weights.npz")'

    def sizes(self) -> NpzSizes:
        return NpzSizes(self.checkpoint)

    def rehearse(self, graph: gs.Graph) -> None:
        if any(node.op == "GatherBlockQuantized" for node in graph.nodes):
            raise PassError("the toy engine looks no quantized embedding up; leave quantize_embedding out.")

    def lower(self, graph: gs.Graph, model_file: Path, samples: list[Feeds]) -> float:
        probe = samples[0]["input_ids"][0, :PROBE]
        return check_lowered(graph, model_file, probe, decoder_feeds(graph, probe[None]))

    def write(self, model_file: Path, folder: Path, scratch: Path, progress: Callable[[float], None]) -> tuple[str, ...]:
        model = load_model(model_file)
        arrays = {name: read(model_file, tensor) for name, tensor in external(model).items()}
        save = np.savez_compressed if self.options.compressed else np.savez
        save(folder / WEIGHTS, allow_pickle=False, **arrays)
        (folder / MODEL).write_bytes(model.SerializeToString())
        shutil.copyfile(self.checkpoint.folder / TOKENIZER, folder / TOKENIZER)
        progress(1.0)
        return (f"{len(arrays)} arrays",)

    @staticmethod
    def prove(model_file: Path, folder: Path, scratch: Path) -> Proof:
        with np.load(folder / WEIGHTS) as found:
            for name, tensor in external(load_model(model_file)).items():
                if not np.array_equal(found[name], read(model_file, tensor)):
                    raise ConvertError(f"'{name}' differs in {folder / WEIGHTS}.")
        layers = read_layers(model_file).values()
        return Proof(len(layers), sum(layer.n * layer.k for layer in layers))

    def compare(self, model_file: Path, folder: Path, samples: list[Feeds], scratch: Path) -> EngineOnText:
        settings: dict[str, dict[str, int]] = {"exact": {"accuracy_level": 0}, "as_stored": {}}
        ask = partial(ask_engine, "the toy engine", WORKER, folder, settings, scratch)
        return compare_runtimes("the toy engine", ask, model_file, samples, self.checkpoint, self.new_tokens)

    @classmethod
    def chat(cls, folder: Path, checkpoint: Checkpoint) -> OnnxEngine:
        return OnnxEngine(open_npz(folder), checkpoint)


def open_npz(folder: Path, accuracy_level: int | None = None) -> onnxruntime.InferenceSession:
    """The folder in onnxruntime, its weights from the archive."""
    model = load_model(folder / MODEL, accuracy_level)
    with np.load(folder / WEIGHTS) as arrays:
        for name, tensor in external(model).items():
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
            tensor.raw_data = arrays[name].tobytes()
    return open_session(model, folder)


def external(model: onnx.ModelProto) -> dict[str, TensorProto]:
    """The weights of a model, by name."""
    return {tensor.name: tensor for tensor in model.graph.initializer if tensor.external_data}


def read(model_file: Path, tensor: TensorProto) -> np.ndarray:
    """The bytes of a weight, uint8."""
    source = region(model_file, tensor)
    return np.ascontiguousarray(source.rows(0, source.shape[0])).view(np.uint8).reshape(-1)
