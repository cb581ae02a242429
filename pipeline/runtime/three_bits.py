"""Three-bit layers -> four-bit ones before onnxruntime sees them: what its own folding would arrive at, without its cost.

onnxruntime folds the unpacking of MatMul3Bits when it loads a model: eight times slower than four bits load, and with many
times the memory. Here the codes are expanded on every core and injected as an initializer of MatMulNBits(bits=4).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto

from lowbit.passes.graph.quantized_ops import DOMAIN, MICROSOFT
from lowbit.passes.quant.pack import expand_nib77
from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.weights import rows_per_chunk
from lowbit.pipeline.onnx_io.reader import region
from lowbit.pipeline.onnx_io.stored_layer import Region

SHARED = ("K", "N", "block_size", "accuracy_level")
"""Attributes of MatMul3Bits that MatMulNBits has, too."""


def expand_three_bits(model: onnx.ModelProto, folder: Path) -> dict[str, npt.NDArray[np.uint8]]:
    """Turn every MatMul3Bits of `model`, its data in `folder`, into MatMulNBits(bits=4).

    Returns:
        The codes to inject by initializer name, uint8 [N, K / block_size, block_size / 2].
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    codes: dict[str, npt.NDArray[np.uint8]] = {}
    for name, shape in as_four_bits(model).items():
        codes[name] = np.concatenate(list(expanded(region(folder / "model.onnx", tensors[name])))).reshape(shape)
        _announce(tensors[name], codes[name])
    return codes


def as_four_bits(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Let every MatMul3Bits of `model` be a MatMulNBits(bits=4), its codes not yet expanded.

    Returns:
        Names of their initializers, and the shape that each must take: [N, K / block_size, block_size / 2].
    """
    shapes: dict[str, list[int]] = {}
    for node in model.graph.node:
        if (node.domain, node.op_type) != (DOMAIN, "MatMul3Bits"):
            continue
        attributes = {a.name: a.i for a in node.attribute if a.name in SHARED}
        shapes[node.input[1]] = next(list(a.ints) for a in node.attribute if a.name == "nibble_shape")
        node.domain, node.op_type = MICROSOFT, "MatMulNBits"
        del node.attribute[:]
        node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in (attributes | {"bits": 4}).items())
    return shapes


def expanded(planes: Region) -> Iterator[npt.NDArray[np.uint8]]:
    """Three-bit codes uint8 [N, 3, K / 8] as nibbles, uint8 [rows, K / 2], from the first row to the last."""
    step = rows_per_chunk(planes.row_bytes)
    starts = range(0, planes.shape[0], step)
    return in_order(lambda start: expand_nib77(planes.rows(start, min(start + step, planes.shape[0]))), starts)


def _announce(tensor: TensorProto, codes: npt.NDArray[np.uint8]) -> None:
    """Give the placeholder its new shape; its bytes are injected, yet must lie inside a file that exists."""
    del tensor.dims[:]
    tensor.dims.extend(codes.shape)
    for entry in tensor.external_data:
        entry.value = {"offset": "0", "length": str(codes.nbytes)}.get(entry.key, entry.value)
