"""A graph with lazy weights -> model.onnx and model.onnx.data, each byte written once, in streams."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from passes._quantized import Part, QuantizedWeight
from passes._weights import Weight
from pipeline.checkpoint import CheckpointWeight
from pipeline.errors import PipelineError
from pipeline.store import Entry

MODEL, DATA = "model.onnx", "model.onnx.data"
PAGE = 4096


def write_model(graph: gs.Graph, folder: Path, entry_of: Callable[[QuantizedWeight], Entry], metadata: dict[str, str]) -> None:
    """Write `graph` to `folder` as model.onnx with all its weights in model.onnx.data.

    Weights of equal content (a tied table quantized for both its users) are stored once. `metadata` goes
    into the model's metadata_props.
    """
    weights = {
        tensor.name: tensor._values
        for tensor in graph.tensors().values()
        if isinstance(tensor, gs.Constant) and isinstance(tensor._values, Weight)
    }
    places: dict[str, tuple[int, int]] = {}
    written: dict[object, tuple[int, int]] = {}
    with (folder / DATA).open("wb") as stream:
        for name in sorted(weights):
            content = _content(weights[name], entry_of)
            if content not in written:
                written[content] = _append(stream, name, weights[name], entry_of)
            places[name] = written[content]
    model = gs.export_onnx(graph)
    model.producer_name = "lowbit"
    model.opset_import.sort(key=lambda one: one.domain)  # graphsurgeon's order is that of a set of strings
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    for tensor in model.graph.initializer:
        if tensor.name in places:
            offset, length = places[tensor.name]
            del tensor.external_data[:]
            for key, place in (("location", DATA), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(place))
    (folder / MODEL).write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(folder / MODEL))


def _content(weight: Weight, entry_of: Callable[[QuantizedWeight], Entry]) -> object:
    if isinstance(weight, Part):
        return entry_of(weight.of).folder, weight.part
    if isinstance(weight, CheckpointWeight):
        return weight.file, weight.offset
    return id(weight)


def _append(stream: BinaryIO, name: str, weight: Weight, entry_of: Callable[[QuantizedWeight], Entry]) -> tuple[int, int]:
    """Append a weight, large ones at a page of their own; returns (offset, length)."""
    align = PAGE if weight.nbytes >= 256 * PAGE else 64
    stream.write(b"\0" * (-stream.tell() % align))
    offset = stream.tell()
    if isinstance(weight, Part):
        with entry_of(weight.of).file(weight.part).open("rb") as source:
            shutil.copyfileobj(source, stream, 8 << 20)
    else:
        for start, rows in weight.chunks():
            if not np.isfinite(rows.astype(np.float32)).all():
                raise PipelineError(f"'{name}': a weight from row {start} on is NaN or infinite; the checkpoint is damaged.")
            stream.write(rows.reshape(-1).view(np.uint8).data)
    length = stream.tell() - offset
    if length != weight.nbytes:
        raise RuntimeError(f"wrote {length} bytes for a weight of {weight.nbytes}")
    return offset, length


def quantization_metadata(weights: list[QuantizedWeight]) -> dict[str, str]:
    """What the file says about itself: one line for each kind of quantized weight, by layer."""
    rows = {
        w.name: {
            "bits": w.form.bits, "block_size": w.form.block_size, "symmetric": w.form.symmetric,
            "method": w.method_name, "layout": "nib77" if w.form.bits == 3 else "lsb",
        }
        for w in weights
    }  # fmt: skip
    return {"lowbit.quantization": json.dumps(rows, sort_keys=True)}
