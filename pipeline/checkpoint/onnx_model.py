"""An ONNX file of one's own -> a checkpoint: no export, no torch."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs
from onnx import TensorProto

from lowbit.passes.quant.weights import ArrayWeight, Weight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.onnx_limits import not_text, objection
from lowbit.pipeline.checkpoint.safetensors_file import CheckpointWeight
from lowbit.pipeline.errors import CheckpointError
from lowbit.pipeline.limits import MOST_ONNX_BYTES, OUT_OF_MEMORY, onnx_limits
from lowbit.pipeline.processes import run_worker, same_path

OPSET = 18
"""The oldest operator set that three-bit layers can be written in; older graphs are lifted to it."""
SMALL_BYTES = 1024
"""Constants of fewer bytes stay where they are, in the graph."""


class InlineWeight(ArrayWeight):
    """A weight that an ONNX file holds inside itself; those files have 2 GB at most."""

    def __init__(self, array: npt.NDArray, file: Path) -> None:
        super().__init__(array)
        self.file = file


KEYS = {"location", "offset", "length", "checksum", "basepath"}
"""What ONNX says of external data."""


@dataclass(frozen=True)
class OnnxModel(Checkpoint):
    """An ONNX file, its external weights left where they are.

    Attributes:
        folder: where the file lies, and perhaps a tokenizer beside it.
        file: the graph.
    """

    file: Path = Path()

    @cached_property
    def config(self) -> dict[str, Any]:
        return {"model_type": "onnx"}

    @cached_property
    def weights(self) -> dict[str, Any]:
        constants = self.graph().tensors().values()
        return {t.name: t._values for t in constants if isinstance(t, gs.Constant) and isinstance(t._values, Weight)}

    def graph(self) -> gs.Graph:
        """The graph with lazy weights, freshly read.

        Raises:
            CheckpointError: it is no ONNX file, lacks its data, or cannot be lifted to opset 18.
        """
        model = self._load()
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        try:
            graph = gs.import_onnx(model)
        except Exception as error:  # of any kind, by what it stumbles over
            what = f"{type(error).__name__}: {str(error)[:200]}"
            raise CheckpointError(f"{self.file}: not a valid ONNX model: onnx-graphsurgeon cannot read it: {what}") from error
        graph.name = "model"
        for tensor in graph.tensors().values():
            if isinstance(tensor, gs.Constant) and tensor.name in tensors:
                weight = self._weight(tensors[tensor.name])
                if weight is not None:
                    tensor.values = weight
        return graph

    def _load(self) -> onnx.ModelProto:
        if (size := self.file.stat().st_size) > MOST_ONNX_BYTES:
            raise CheckpointError(
                f"{self.file}: has {size:,} bytes, protobuf reads {MOST_ONNX_BYTES:,} at most. Save it again with its "
                "weights in a file beside it: onnx.save(model, path, save_as_external_data=True)."
            )
        try:
            model = onnx.load(str(self.file), load_external_data=False)
            onnx.checker.check_model(str(self.file))
        except Exception as error:  # protobuf's and the checker's have no common ancestor
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise CheckpointError(f"{self.file}: not a valid ONNX model: {reason[0][:300]}") from error
        if (name := not_text(model)) is not None:
            raise CheckpointError(f"{self.file}: not a valid ONNX model: has the name {name[:100]!r}, which is no text.")
        if (why := objection(model.graph)) is not None:
            raise CheckpointError(f"{self.file}: {why}.")
        version = next((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), OPSET)
        if version > (newest := onnx.defs.onnx_opset_version()):
            raise CheckpointError(f"{self.file}: has opset {version}; onnx knows {newest} at most. Export it with {OPSET}.")
        if version >= OPSET:
            return model
        try:
            return onnx.version_converter.convert_version(model, OPSET)
        except Exception as error:  # of any kind, by operator
            raise CheckpointError(
                f"{self.file}: has opset {version}, and onnx cannot lift it to {OPSET} ({str(error)[:200]}). Export it anew "
                f"with opset {OPSET}."
            ) from error

    def _weight(self, tensor: TensorProto) -> Weight | None:
        if tensor.data_location != TensorProto.EXTERNAL:
            if tensor.ByteSize() < SMALL_BYTES:
                return None
            return InlineWeight(onnx.numpy_helper.to_array(tensor), self.file)
        place = {entry.key: entry.value for entry in tensor.external_data}
        if odd := sorted(set(place) - KEYS):
            raise self._wrong(tensor.name, f"have the attribute {odd[0]!r}, which ONNX does not know")
        file = self._data_file(tensor.name, place.get("location", ""))
        weight = CheckpointWeight(
            tensor.name, file, self._number(tensor.name, place, "offset", 0), tuple(tensor.dims), tensor.data_type
        )
        if self._number(tensor.name, place, "length", weight.nbytes) != weight.nbytes:
            raise self._wrong(tensor.name, f"are {place['length']} bytes, its shape {list(tensor.dims)} needs {weight.nbytes}")
        if weight.offset + weight.nbytes > (size := file.stat().st_size):
            raise self._wrong(tensor.name, f"end at byte {weight.offset + weight.nbytes}, {file.name} has {size}")
        return weight

    def _data_file(self, name: str, location: str) -> Path:
        """The file of external data, if it is a plain one beneath the model's folder: no link of either kind, no way out."""
        file = self.folder / location
        if not file.is_file() or file.resolve() != file or not file.is_relative_to(self.folder) or file.stat().st_nlink > 1:
            raise self._wrong(name, f"lie in {location!r}, which is no plain file beneath {self.folder}")
        return file

    def _number(self, name: str, place: dict[str, str], key: str, default: int) -> int:
        text = place.get(key, str(default))
        if not (text.isascii() and text.isdecimal()):
            raise self._wrong(name, f"have the {key} {text!r}, which is no number")
        return int(text)

    def _wrong(self, name: str, what: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: the external data of '{name}' {what}. The file is damaged, or not to be trusted.")


def open_onnx(file: Path, source: str) -> OnnxModel:
    """An ONNX file that exists, and that onnx and onnxruntime read within limits.

    Raises:
        CheckpointError: there is none, or they do not. What is no ONNX file at all is left to `OnnxModel.graph`.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such ONNX file.")
    _check_limits(file.resolve())
    return OnnxModel(file.resolve().parent, source, None, file.resolve())


def _check_limits(file: Path) -> None:
    """Read a file in a process that has the time and memory that one of its size needs: what crashes there does no harm."""
    status = run_worker("-m", "lowbit.pipeline.checkpoint.onnx_worker", str(file), env=same_path()).returncode
    seconds, size = onnx_limits(disk_bytes(file.parent), os.cpu_count() or 1)
    if status == OUT_OF_MEMORY:
        why = f"takes more than {size >> 30} GB of memory to read"
    elif status in (-signal.SIGXCPU, -signal.SIGKILL):
        why = f"takes more than {seconds} s of processor time, or all memory, to read"
    elif status < 0:
        why = f"crashes onnx or onnxruntime ({signal.Signals(-status).name})"
    else:
        return
    raise CheckpointError(f"{file}: {why}. Export it anew, or fetch it again.")


def disk_bytes(folder: Path) -> int:
    """What the files of a folder take on the disk: holes in them, which may be of any size, do not count."""
    return sum(512 * path.stat().st_blocks for path in folder.iterdir() if path.is_file() and not path.is_symlink())
