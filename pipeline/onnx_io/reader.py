"""A finished model.onnx -> its quantized weights, read back from the file itself; the file may be a stranger's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from lowbit.pipeline.checkpoint.files import regular_file
from lowbit.pipeline.checkpoint.onnx_limits import not_text
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.limits import MOST_ONNX_BYTES
from lowbit.pipeline.onnx_io.stored_layer import Region, StoredLayer

FLOATS = (np.dtype(np.float16), np.dtype(np.float32))
QUANTIZED = ("MatMulNBits", "MatMul3Bits", "GatherBlockQuantized")
Makers = Mapping[str, onnx.NodeProto]
Tensors = Mapping[str, TensorProto]


def read_model(model_file: Path) -> onnx.ModelProto:
    """A model file without its weights.

    Raises:
        PipelineError: it is missing, or none, or larger than protobuf reads.
    """
    file = regular_file(model_file, MOST_ONNX_BYTES)
    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:  # protobuf's own, which has no types
        raise PipelineError(f"{model_file}: not an ONNX file, or cut short. Run the recipe again.") from error
    if (name := not_text(model)) is not None:
        raise PipelineError(f"{model_file}: has the name {name!r}, which is no text. Run the recipe again.")
    return model


def read_layers(model_file: Path) -> dict[str, StoredLayer]:
    """Every quantized weight of a model file, by layer name; no weight is read.

    Raises:
        PipelineError: it is none that lowbit wrote, or its data file is not whole.
    """
    model = read_model(model_file)
    tensors = {t.name: t for t in model.graph.initializer}
    makers = {output: node for node in model.graph.node for output in node.output}
    return {node.name: _layer(model_file, node, tensors, makers) for node in model.graph.node if node.op_type in QUANTIZED}


def _layer(model_file: Path, node: onnx.NodeProto, tensors: Tensors, makers: Makers) -> StoredLayer:
    def place(name: str) -> Region:
        if name not in tensors:
            raise _odd(model_file, node, f"'{name}' is no constant")
        return region(model_file, tensors[name])

    attrs = {a.name: a.i for a in node.attribute}
    embedding = node.op_type == "GatherBlockQuantized"
    if len(node.input) < 3 or attrs.get("bits") not in (2, 3, 4, 8) or attrs.get("block_size") not in (16, 32, 64, 128, 256):
        raise _odd(model_file, node, "it lacks an input, or has another width or block")
    bits = attrs["bits"]
    codes, scales = place(node.input[0 if embedding else 1]), _widened(node.input[2], makers)
    zeros = tensors.get(node.input[3]) if len(node.input) > 3 else None
    offsets = _offsets_behind(node.input[3], scales, bits, makers, tensors) if len(node.input) > 3 else None
    width = math.prod(codes.shape[1:]) * 8 // bits
    n, k = (codes.shape[0], width) if embedding else (attrs.get("N", 0), attrs.get("K", 0))
    layer = StoredLayer(
        node.name, bits, attrs["block_size"], n, k, codes, place(scales),
        None if zeros is None else region(model_file, zeros), None if offsets is None else place(offsets), embedding,
    )  # fmt: skip
    if not _fits(layer):
        raise _odd(model_file, node, f"its parts are not those of {n} x {k} weights")
    return layer


def _fits(layer: StoredLayer) -> bool:
    """Whether every part is of the shape and type that the kernels take it for: they look at no bounds."""
    if layer.n < 1 or layer.k < 1:
        return False
    zero_bytes = -(-layer.blocks * (4 if layer.bits == 3 else layer.bits) // 8)
    wanted = [(layer.codes, (np.dtype(np.uint8),), layer.padded_k * layer.bits // 8), (layer.scales, FLOATS, layer.blocks)]
    wanted += [(layer.zero_points, (np.dtype(np.uint8),), zero_bytes)] if layer.zero_points is not None else []
    wanted += [(layer.offsets, FLOATS, layer.blocks)] if layer.offsets is not None else []
    return all(
        part.dtype in dtypes and part.shape[0] == layer.n and math.prod(part.shape[1:]) == row and len(part.shape) > 1
        for part, dtypes, row in wanted
    )


def _odd(model_file: Path, node: onnx.NodeProto, what: str) -> PipelineError:
    return PipelineError(f"{model_file}: '{node.name}' is no layer that lowbit wrote: {what}. Run the recipe again.")


def _widened(name: str, makers: Makers) -> str:
    """The tensor behind a Cast, or itself."""
    maker = makers.get(name)
    return maker.input[0] if maker is not None and maker.op_type == "Cast" and maker.input else name


def _offsets_behind(zeros: str, scales: str, bits: int, makers: Makers, tensors: Tensors) -> str | None:
    """The offsets of zero points that are computed as 2^(bits-1) - offsets / scales; None if they are not computed so."""
    difference = makers.get(zeros)
    if difference is None or difference.op_type != "Sub" or len(difference.input) != 2:
        return None
    middle, ratio = tensors.get(difference.input[0]), makers.get(difference.input[1])
    if middle is None or ratio is None or ratio.op_type != "Div" or len(ratio.input) != 2:
        return None
    codes = {bits, 3} if bits == 4 else {bits}  # nibbles may hold three-bit codes
    if _widened(ratio.input[1], makers) != scales or _number(middle) not in {1 << (width - 1) for width in codes}:
        return None
    return _widened(ratio.input[0], makers)


def _number(tensor: TensorProto) -> float | None:
    """The one number that a constant holds, itself; None if it holds something else."""
    if tensor.data_location == TensorProto.EXTERNAL or math.prod(tensor.dims) != 1:
        return None
    try:
        return float(onnx.numpy_helper.to_array(tensor).reshape(()))
    except (ValueError, TypeError):
        return None


def plain_file(folder: Path, name: str, where: Path) -> Path:
    """The file of that name in `folder`, which `where` names: no way out of it, no link.

    Raises:
        PipelineError: it is none.
    """
    if not name or not name.isprintable() or Path(name).name != name:
        raise PipelineError(f"{where}: names {name[:200]!r}, which is no file beside it. Run the recipe again.")
    return regular_file(folder / name)


def region(model_file: Path, tensor: TensorProto) -> Region:
    """Where the external data of a tensor lies: always in a file beside the model, and whole.

    Raises:
        PipelineError: it does not.
    """
    place = {entry.key: entry.value for entry in tensor.external_data}
    name = place.get("location", "")
    if not name or Path(name).name != name:
        raise PipelineError(f"{model_file}: '{tensor.name}' lies at '{name}', not in a file beside the model.")
    file, offset = plain_file(model_file.parent, name, model_file), place.get("offset", "0")
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, TypeError, ValueError) as error:
        raise PipelineError(f"{model_file}: '{tensor.name}' has the type {tensor.data_type}. Run the recipe again.") from error
    shape = tuple(tensor.dims) or (1,)
    known = offset.isascii() and offset.isdecimal() and len(offset) < 20 and all(size >= 0 for size in shape)
    if not known or int(offset) + math.prod(shape) * dtype.itemsize > file.stat().st_size:
        raise PipelineError(f"{file}: cut short, or '{tensor.name}' does not lie in it. Run the recipe again.")
    return Region(file, int(offset), shape, dtype)
