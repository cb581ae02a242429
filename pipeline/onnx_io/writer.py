"""A graph with lazy weights -> model.onnx, and model.onnx.data beside it, which is filled as weights come."""

from __future__ import annotations

import json
import os
from collections.abc import Hashable, Iterable
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import Weight

MODEL, DATA = "model.onnx", "model.onnx.data"
PAGE = 4096


class DataFile:
    """model.onnx.data in the making: appended from one thread, each content once.

    Attributes:
        places: offset and length of what was appended, by the content it was appended as.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("xb", buffering=0)
        self.places: dict[Hashable, tuple[int, int]] = {}

    def append(self, content: Hashable, size: int, chunks: Iterable[memoryview]) -> None:
        """Append `size` bytes, large contents at a page of their own; what is there already is not read again."""
        if content in self.places:
            return
        align = PAGE if size >= 256 * PAGE else 64
        self._stream.write(b"\0" * (-self._stream.tell() % align))
        offset = self._stream.tell()
        for chunk in chunks:
            while chunk:  # an unbuffered write may take a part
                chunk = chunk[self._stream.write(chunk) :]
        if self._stream.tell() - offset != size:
            raise RuntimeError(f"wrote {self._stream.tell() - offset} bytes for a weight of {size}")
        self.places[content] = offset, size

    def close(self) -> None:
        """Wait until everything is on the disk."""
        os.fsync(self._stream.fileno())
        self._stream.close()


def external_weights(graph: gs.Graph) -> dict[str, Weight]:
    """The weights of a graph that go into the data file, by tensor name, in the order they lie there."""
    constants = (tensor for tensor in graph.tensors().values() if isinstance(tensor, gs.Constant))
    weights = {tensor.name: tensor._values for tensor in constants if isinstance(tensor._values, Weight)}
    return dict(sorted(weights.items()))


def exported(graph: gs.Graph, metadata: dict[str, str]) -> onnx.ModelProto:
    """`graph` as a model whose weights have no place yet; `metadata` goes into its metadata_props."""
    model = gs.export_onnx(graph)
    model.producer_name = "lowbit"
    model.opset_import.sort(key=lambda opset: opset.domain)  # graphsurgeon's order is that of a set of strings
    for key, value in metadata.items():
        model.metadata_props.add(key=key, value=value)
    return model


def write_model(model: onnx.ModelProto, file: Path, places: dict[str, tuple[int, int]]) -> None:
    """Write `model` to `file`, its weights at `places` (offset, length) of the data file beside it."""
    for tensor in model.graph.initializer:
        if tensor.name in places:
            offset, length = places[tensor.name]
            del tensor.external_data[:]
            for key, place in (("location", DATA), ("offset", offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(place))
    file.write_bytes(model.SerializeToString())


def quantization_metadata(weights: list[QuantizedWeight]) -> dict[str, str]:
    """What the file says about itself: one line for each kind of quantized weight, by layer."""
    rows = {
        w.name: {
            "bits": w.form.bits, "block_size": w.form.block_size, "symmetric": w.form.symmetric,
            "zero_point": w.form.zero_point, "method": w.made_by, "layout": "nib77" if w.form.bits == 3 else "lsb",
        }
        for w in weights
    }  # fmt: skip
    return {"lowbit.quantization": json.dumps(rows, sort_keys=True)}
