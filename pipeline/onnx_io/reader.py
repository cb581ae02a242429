"""A finished model.onnx -> its quantized weights, read back from the file itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.onnx_io.stored_layer import Region, StoredLayer


def read_layers(model_file: Path) -> dict[str, StoredLayer]:
    """Every quantized weight of a model file, by layer name; no weight is read."""
    model = onnx.load(str(model_file), load_external_data=False)
    tensors = {t.name: t for t in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    layers = {}
    for node in model.graph.node:
        if node.op_type not in ("MatMulNBits", "MatMul3Bits", "GatherBlockQuantized"):
            continue
        attrs = {a.name: a.i for a in node.attribute}
        embedding = node.op_type == "GatherBlockQuantized"
        codes = region(model_file, tensors[node.input[0 if embedding else 1]])
        scales = _widened(node.input[2], makers)
        zeros = tensors.get(node.input[3]) if len(node.input) > 3 else None
        bits = attrs["bits"]
        offsets = _offsets_behind(node.input[3], scales, bits, makers, tensors) if len(node.input) > 3 else None
        n, k = (codes.shape[0], codes.shape[1] * 8 // bits) if embedding else (attrs["N"], attrs["K"])
        layers[node.name] = StoredLayer(
            node.name, bits, attrs["block_size"], n, k, codes, region(model_file, tensors[scales]),
            None if zeros is None else region(model_file, zeros),
            None if offsets is None else region(model_file, tensors[offsets]), embedding,
        )  # fmt: skip
    return layers


def _widened(name: str, makers: dict[str, onnx.NodeProto]) -> str:
    """The tensor behind a Cast, or itself."""
    maker = makers.get(name)
    return maker.input[0] if maker is not None and maker.op_type == "Cast" else name


def _offsets_behind(
    zeros: str, scales: str, bits: int, makers: dict[str, onnx.NodeProto], tensors: dict[str, TensorProto]
) -> str | None:
    """The offsets of zero points that are computed as 2^(bits-1) - offsets / scales; None if they are not computed so."""
    difference = makers.get(zeros)
    if difference is None or difference.op_type != "Sub":
        return None
    middle, ratio = tensors.get(difference.input[0]), makers.get(difference.input[1])
    if middle is None or ratio is None or ratio.op_type != "Div" or _widened(ratio.input[1], makers) != scales:
        return None
    codes = {bits, 3} if bits == 4 else {bits}  # nibbles may hold three-bit codes
    same = onnx.numpy_helper.to_array(middle).tolist() in {1 << (width - 1) for width in codes}
    return _widened(ratio.input[0], makers) if same else None


def region(model_file: Path, tensor: TensorProto) -> Region:
    """Where the external data of a tensor lies: always a file beside the model."""
    place = {entry.key: entry.value for entry in tensor.external_data}
    name = place.get("location", "")
    if not name or Path(name).name != name:
        raise PipelineError(f"{model_file}: '{tensor.name}' lies at '{name}', not in a file beside the model.")
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return Region(model_file.parent / name, int(place.get("offset", 0)), tuple(tensor.dims), dtype)
