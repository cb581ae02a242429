"""A Hugging Face checkpoint folder -> configuration and lazy weights, read without trust and without loading a weight."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.errors import CheckpointError

MAX_HEADER_BYTES = 25_000_000
"""The cap of the safetensors format itself (https://github.com/huggingface/safetensors#format)."""

FLOAT_TYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}

SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
"""What travels with the weights into the result, where the checkpoint has it."""


class CheckpointWeight(Weight):
    """A tensor of a .safetensors file, read by rows with pread: never mapped, never kept."""

    def __init__(self, name: str, file: Path, offset: int, shape: tuple[int, ...], onnx_dtype: int) -> None:
        super().__init__(shape, onnx_dtype)
        self.name = name
        self.file = file
        self.offset = offset

    def rows(self, start: int, stop: int) -> npt.NDArray:
        row = math.prod(self.shape[1:])
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.onnx_dtype))
        count = (stop - start) * row
        data = np.fromfile(self.file, np.uint8, count * dtype.itemsize, offset=self.offset + start * row * dtype.itemsize)
        if data.size != count * dtype.itemsize:
            raise CheckpointError(f"{self.file}: ends inside '{self.name}'; it changed while being read.")
        return data.view(dtype).reshape(stop - start, *self.shape[1:])

    @property
    def tensor(self) -> onnx.TensorProto:
        """External data that points into the .safetensors file itself."""
        proto = super().tensor
        for key, value in (("location", self.file.name), ("offset", self.offset), ("length", self.nbytes)):
            proto.external_data.add(key=key, value=str(value))
        return proto


@dataclass(frozen=True)
class Checkpoint:
    """A folder with config.json and .safetensors files.

    Attributes:
        folder: where it is.
        source: what the user called it, a path or a Hub id.
        revision: the commit on the Hub, or None.
    """

    folder: Path
    source: str
    revision: str | None = None

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json as it is written, before any library interprets it."""
        return self.read_json("config.json")

    @cached_property
    def weights(self) -> dict[str, CheckpointWeight]:
        """Every tensor of every shard, by its checkpoint name; only headers are read.

        Raises:
            CheckpointError: a file is cut short, its header lies, a shard is missing, or all there is
                is a pickle.
        """
        weights: dict[str, CheckpointWeight] = {}
        for file in self._shards():
            weights |= _read_header(file)
        return weights

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object of the folder; {} when the file is absent."""
        path = self.folder / name
        if not path.exists():
            return {}
        try:
            value = json.loads(path.read_text("utf-8"))
        except (ValueError, OSError, RecursionError) as error:
            raise CheckpointError(f"{path}: not readable as JSON: {error}") from error
        if not isinstance(value, dict):
            raise CheckpointError(f"{path}: holds a {type(value).__name__}, expected a JSON object.")
        return value

    def _shards(self) -> list[Path]:
        index = self.folder / "model.safetensors.index.json"
        if index.exists():
            shards = self.read_json(index.name).get("weight_map", {})
            if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
                raise CheckpointError(f"{index}: its weight_map does not name shards by the tensors in them.")
            names = sorted(set(shards.values()))
            for name in names:
                if Path(name).name != name or name == "..":
                    raise CheckpointError(f"{index}: shard '{name}' is not a plain file name.")
                if not (self.folder / name).is_file():
                    raise CheckpointError(f"{index}: names the shard '{name}', which is not in {self.folder}.")
            return [self.folder / name for name in names]
        files = sorted(self.folder.glob("*.safetensors"))
        if files:
            return files
        pickles = sorted(p.name for kind in ("*.bin", "*.pt", "*.pth") for p in self.folder.glob(kind))
        if pickles:
            raise CheckpointError(
                f"{self.folder}: has {pickles[0]} but no .safetensors file. A pickle can run any code when it is "
                "opened, so it is not read. Convert it once where you trust it: "
                "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)."
            )
        raise CheckpointError(f"{self.folder}: no .safetensors file here.")


def open_checkpoint(folder: Path, source: str, revision: str | None = None) -> Checkpoint:
    """A checkpoint folder that exists and has a configuration."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder. Give one with config.json and .safetensors.")
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: no config.json, so this is not a Hugging Face checkpoint.")
    return Checkpoint(folder, source, revision)


def _read_header(file: Path) -> dict[str, CheckpointWeight]:
    """The tensors of one .safetensors file, its header checked against its size."""
    real = _real(file)
    size = real.stat().st_size
    start, header = _header(file, real, size)
    weights, expected = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(file, *item)):
        begin, end = entry["data_offsets"]
        shape, kind = entry.get("shape"), entry.get("dtype")
        if not isinstance(kind, str):
            raise CheckpointError(f"{file}: '{name}' has the dtype {kind}; its header is damaged.")
        if not isinstance(shape, list) or not all(type(d) is int and d >= 0 for d in shape):
            raise CheckpointError(f"{file}: '{name}' has the shape {shape}.")
        if begin != expected or start + end > size:
            raise CheckpointError(
                f"{file}: '{name}' lies at bytes {begin} to {end}, expected {expected} onwards in {size - start} "
                "bytes of data: the file is cut short or damaged. Fetch it again."
            )
        expected = end
        if kind not in FLOAT_TYPES:  # buffers of integers, quantized weights: an error only if the graph needs them
            continue
        weight = CheckpointWeight(name, real, start + begin, tuple(shape), FLOAT_TYPES[kind])
        if weight.nbytes != end - begin:
            raise CheckpointError(f"{file}: '{name}' has {end - begin} bytes, its shape {shape} needs {weight.nbytes}.")
        weights[name] = weight
    if start + expected != size:
        raise CheckpointError(f"{file}: {size - start - expected} bytes follow the last tensor; the file is damaged.")
    return weights


def _header(file: Path, real: Path, size: int) -> tuple[int, dict[str, Any]]:
    """Where a file's data begin, and its header: what is said of each tensor, by name."""
    with real.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file}: not a safetensors file, or cut short ({size} bytes).")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{file}: its header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is not a JSON object.")
    header.pop("__metadata__", None)
    return 8 + length, header


def _real(file: Path) -> Path:
    """The file itself: onnxruntime reads no links. The Hub's cache links to its blobs; any other link must stay in its folder.

    Raises:
        CheckpointError: the link leads out of the checkpoint.
    """
    real, folder = file.resolve(), file.parent.resolve()
    allowed = [folder, folder.parent.parent / "blobs"]  # models--x/snapshots/<commit>/file -> models--x/blobs/<hash>
    if file.is_symlink() and not any(real.is_relative_to(parent) for parent in allowed):
        raise CheckpointError(f"{file}: is a link to {real}, outside the checkpoint. Put the file itself there.")
    return real


def _begin(file: Path, name: str, entry: Any) -> int:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)):
        raise CheckpointError(f"{file}: '{name}' has no data_offsets.")
    if not 0 <= offsets[0] <= offsets[1]:
        raise CheckpointError(f"{file}: '{name}' has the data_offsets {offsets}.")
    return int(offsets[0])


def stat_signature(file: Path) -> tuple[int, int, int, int]:
    """Changes whenever the file's content may have: size, mtime, ctime, inode."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
