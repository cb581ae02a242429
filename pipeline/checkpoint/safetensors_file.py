"""A .safetensors file -> lazy weights, its header read without trust."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.checkpoint.files import parse_json, regular_file
from lowbit.pipeline.errors import CheckpointError
from lowbit.pipeline.limits import MAX_HEADER_BYTES, MOST_RANK

FLOAT_TYPES = {"F32": TensorProto.FLOAT, "F16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16}


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


def read_header(file: Path) -> dict[str, CheckpointWeight]:
    """The tensors of one .safetensors file by name, its header checked against its size; no weight is read.

    Raises:
        CheckpointError: the file is cut short, its header lies, or it is a link out of its folder.
    """
    real = regular_file(file)
    size = real.stat().st_size
    start, header = _header(file, real, size)
    weights, expected = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _begin(file, *item)):
        begin, end = entry["data_offsets"]
        shape, kind = entry.get("shape"), entry.get("dtype")
        if not isinstance(kind, str):
            raise CheckpointError(f"{file}: '{name}' has the dtype {kind}; its header is damaged.")
        if not isinstance(shape, list) or len(shape) > MOST_RANK or not all(type(d) is int and 0 <= d <= size for d in shape):
            raise CheckpointError(f"{file}: '{name}' has the shape {str(shape)[:200]}.")
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
    try:
        stream = real.open("rb")
    except PermissionError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror}). Get the right to read it.") from error
    with stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise CheckpointError(f"{file}: not a safetensors file, or cut short ({size} bytes).")
        try:
            header = parse_json(stream.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file}: its header is damaged: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is not a JSON object.")
    header.pop("__metadata__", None)
    return 8 + length, header


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
