"""A quantized graph of any kind -> model.mnn with the inputs and outputs of the ONNX file, compared and proven."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.passes.base import PassError
from lowbit.passes.lowering.lower_matmul import LowerMatmul
from lowbit.passes.quant.weights import weight_of
from lowbit.pipeline.convert.base import Proof, Target
from lowbit.pipeline.convert.compare_outputs import Outputs, compare_outputs
from lowbit.pipeline.convert.engine_process import run_module
from lowbit.pipeline.convert.mnn.options import MODES, MnnOptions
from lowbit.pipeline.convert.mnn.proof import prove_plain
from lowbit.pipeline.convert.mnn.sizes import MnnSizes
from lowbit.pipeline.convert.mnn.tensors_graph import write_plain
from lowbit.pipeline.onnx_io.reader import read_layers
from lowbit.pipeline.report.engine_quality import EngineOnOutputs
from lowbit.pipeline.runtime.partition import Feeds

MODEL, WEIGHTS = "model.mnn", "model.mnn.weight"
WORKER = "lowbit.pipeline.convert.mnn.tensors_worker"


class Mnn(Target[MnnOptions]):
    """`target: mnn`: tensors in, tensors out, as in the ONNX file, by MNN's engine alone."""

    label = "MNN"
    modes = MODES
    weight_files = (WEIGHTS,)
    packages = ("MNN",)
    sources = (WORKER,)
    decoders = False

    graph: gs.Graph
    notes: tuple[str, ...]

    def sizes(self) -> MnnSizes:
        return MnnSizes(self.checkpoint, self.options.scale_dtype)

    def rehearse(self, graph: gs.Graph) -> None:
        lookup = next((node for node in graph.nodes if node.op == "GatherBlockQuantized"), None)
        if lookup is not None:
            raise PassError(
                f"'{lookup.name}' is quantized by quantize_embedding, which target: mnn has no operator for. Leave that pass "
                "out; MNN's LLM runtime (target: mnn-llm) reads quantized embeddings."
            )
        LowerMatmul().apply(graph)

    def lower(self, graph: gs.Graph, model_file: Path, samples: list[Feeds]) -> None:
        """Nothing is rewritten but the quantized MatMuls, which onnxruntime has no placeholder for: `compare` compares."""
        self.graph = graph
        self.notes = LowerMatmul().apply(graph).notes

    def write(self, model_file: Path, folder: Path, scratch: Path, progress: Callable[[float], None]) -> tuple[str, ...]:
        stored = read_layers(model_file)
        layers = [stored[node.name] for node in self.graph.nodes if node.op == "Linear"]
        placed = write_plain(_whole(self.graph), layers, self.options.scale_dtype, folder / MODEL, scratch)
        with (folder / WEIGHTS).open("ab") as stream:
            for done, layer in enumerate(placed):
                layer.write(stream)
                progress((done + 1) / len(placed))
        return self.notes

    @staticmethod
    def prove(model_file: Path, folder: Path, scratch: Path) -> Proof:
        return prove_plain(model_file, folder / MODEL, scratch)

    def compare(self, model_file: Path, folder: Path, samples: list[Feeds], scratch: Path) -> EngineOnOutputs:
        ask = partial(_run, folder / MODEL, samples, scratch)
        return compare_outputs("MNN", ask, model_file, samples)


def _whole(graph: gs.Graph) -> onnx.ModelProto:
    """The lowered graph as a model with every float weight inside, those in half precision widened."""
    bare = graph.copy()
    bare.functions.clear()
    model = gs.export_onnx(bare)
    tensors = graph.tensors()
    for proto in model.graph.initializer:
        if proto.data_location == TensorProto.EXTERNAL:
            values = weight_of(tensors[proto.name]).load()
            wide = values.astype(np.float32) if _only_widened(tensors[proto.name]) else values
            proto.CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(wide), proto.name))
    return model


def _only_widened(constant: gs.Constant) -> bool:
    """Whether a half-precision constant, or the rows looked up in it, goes into casts alone."""
    if constant._values.onnx_dtype not in (TensorProto.BFLOAT16, TensorProto.FLOAT16):
        return False
    users = [user for node in constant.outputs for user in (node.outputs[0].outputs if node.op == "Gather" else [node])]
    return all(user.op == "Cast" for user in users)


def _run(model: Path, samples: list[Feeds], scratch: Path, outputs: list[str]) -> dict[str, Outputs]:
    """What MNN makes of the samples in each of its modes.

    Raises:
        ConvertError: it crashed, or refused the model.
    """
    inputs, request, result = scratch / "samples.npz", scratch / "request.json", scratch / "result.npz"
    arrays = {f"{i}.{name}": value for i, sample in enumerate(samples) for name, value in sample.items()}
    np.savez(inputs, allow_pickle=False, **arrays)
    asked = {"model": str(model), "modes": list(MODES), "samples": str(inputs), "count": len(samples)}
    request.write_text(json.dumps(asked | {"inputs": list(samples[0]), "outputs": outputs}), "utf-8")
    run_module("MNN", WORKER, model, request, result)
    with np.load(result) as found:
        return {mode: {name: [found[f"{mode}.{i}.{name}"] for i in range(len(samples))] for name in outputs} for mode in MODES}
