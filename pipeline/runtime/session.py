"""A model and files of weights -> an onnxruntime session; token ids -> what a decoder of optimum's wants to be fed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
import onnxruntime

from lowbit.passes.graph.quantized_ops import DOMAIN, MICROSOFT
from lowbit.passes.quant.parallel import core_count
from lowbit.passes.quant.weights import ArrayWeight, weight_of
from lowbit.pipeline.checkpoint.safetensors_file import CheckpointWeight
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.runtime.partition import Feeds


def open_session(
    model: onnx.ModelProto, folder: Path, arena: bool = True, injected: dict[str, onnxruntime.OrtValue] | None = None
) -> onnxruntime.InferenceSession:
    """A CPU session of `model`, whose external data lies in `folder` (a real one: links are refused).

    Without its memory arena a session gives back what it freed: for many sessions one after the other. `injected` are
    initializers from memory; they must live as long as the session.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = core_count()
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = arena
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    for name, value in (injected or {}).items():
        options.add_initializer(name, value)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def load_model(file: Path, accuracy_level: int | None = None) -> onnx.ModelProto:
    """A model file without its weights, the arithmetic of every quantized MatMul overridden if asked."""
    model = onnx.load(str(file), load_external_data=False)
    if accuracy_level is not None:
        set_accuracy_level(model, accuracy_level)
    return model


def set_accuracy_level(model: onnx.ModelProto, level: int) -> None:
    """Let every quantized MatMul compute at `level`: 0 is float32, 4 int8 activations."""
    for node in model.graph.node:
        if node.domain in (DOMAIN, MICROSOFT):
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = level


def accuracy_levels(model: onnx.ModelProto) -> set[int]:
    """Every accuracy_level that a quantized MatMul of `model` has."""
    return {a.i for node in model.graph.node for a in node.attribute if a.name == "accuracy_level"}


def open_model(file: Path, accuracy_level: int | None = None) -> onnxruntime.InferenceSession:
    """A session of a model file; see `load_model`."""
    return open_session(load_model(file, accuracy_level), file.parent)


def weight_folder(graph: gs.Graph) -> Path:
    """The one folder that a float graph's weights lie in, as far as they lie in files of their own.

    Raises:
        PipelineError: they lie in several, which onnxruntime cannot read.
    """
    folders = {
        values.file.parent
        for tensor in graph.tensors().values()
        if isinstance(tensor, gs.Constant) and isinstance(values := weight_of(tensor), CheckpointWeight)
    }
    if len(folders) > 1:
        raise PipelineError(f"the checkpoint's shards lie in {len(folders)} folders; put them into one.")
    return folders.pop() if folders else Path()


def open_reference(graph: gs.Graph) -> onnxruntime.InferenceSession:
    """A session of a float graph, straight from the checkpoint's own files; what an ONNX file holds inside is put in."""
    model, tensors = gs.export_onnx(graph), graph.tensors()
    for proto in model.graph.initializer:
        if isinstance(values := tensors[proto.name]._values, ArrayWeight):
            proto.CopyFrom(onnx.numpy_helper.from_array(values.array, proto.name))
    return open_session(model, weight_folder(graph))


def input_shapes(model: onnxruntime.InferenceSession | gs.Graph) -> dict[str, list[int | str]]:
    """Names and shapes of a model's inputs."""
    inputs = model.inputs if isinstance(model, gs.Graph) else model.get_inputs()
    return {tensor.name: list(tensor.shape) for tensor in inputs}


def decoder_feeds(
    model: onnxruntime.InferenceSession | gs.Graph, ids: npt.NDArray[np.int64], past: Feeds | None = None
) -> Feeds:
    """Inputs for token ids int64 [batch, tokens] after `past` (default: nothing), without padding."""
    shapes = input_shapes(model)
    batch, count = ids.shape
    feeds: Feeds = dict(past or {})
    for name, shape in shapes.items():
        if name.startswith("past_key_values.") and name not in feeds:
            feeds[name] = np.zeros((batch, int(shape[1]), 0, int(shape[3])), np.float32)
    before = next((v.shape[2] for k, v in feeds.items() if k.startswith("past_key_values.")), 0)
    feeds["input_ids"] = ids.astype(np.int64)
    feeds["attention_mask"] = np.ones((batch, before + count), np.int64)
    feeds["position_ids"] = np.tile(np.arange(before, before + count), (batch, 1))
    return {name: value for name, value in feeds.items() if name in shapes}


def decode(session: onnxruntime.InferenceSession, ids: list[int], past: Feeds | None) -> tuple[npt.NDArray[np.float32], Feeds]:
    """Read some more tokens after `past`: logits float32 [vocabulary] after the last, and the new past."""
    names = [tensor.name for tensor in session.get_outputs()]
    outputs = dict(zip(names, session.run(None, decoder_feeds(session, np.array([ids]), past)), strict=True))
    past = {name.replace("present.", "past_key_values."): v for name, v in outputs.items() if name.startswith("present.")}
    return outputs["logits"][0, -1], past
