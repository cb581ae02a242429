"""The proof: every code, scale and zero point of the MNN file against those of the ONNX file.

Both files are decoded here bit by bit from their definitions, sharing nothing with the code that packed
them. What the MNN file claims about itself (offsets, bits, shapes) is read from the final llm.mnn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto, numpy_helper

from lowbit.pipeline.checkpoint.files import regular_file
from lowbit.pipeline.convert.base import Proof
from lowbit.pipeline.convert.mnn.converter import read_json
from lowbit.pipeline.convert.mnn.proof_codes import prove_alpha, prove_codes
from lowbit.pipeline.convert.mnn.proof_embedding import prove_embedding
from lowbit.pipeline.convert.mnn.proof_schema import Convolution, Graph, checked
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.reader import read_layers, read_model, region
from lowbit.pipeline.onnx_io.stored_layer import Region, StoredLayer


def prove_llm(model_file: Path, folder: Path, mnn_file: Path, scratch: Path) -> Proof:
    """Compare every quantized MatMul of `model_file` with the convolution of its name, and the embedding.

    Args:
        folder: of MNN's LLM runtime, its graph in `mnn_file`.

    Raises:
        ConvertError: a layer is missing, or a code, scale, offset or bias differs; names the first.
    """
    stored = read_layers(model_file)
    layers = {name: layer for name, layer in stored.items() if not layer.is_embedding}
    odd = sorted(_prove_layers(layers, _biases(model_file), mnn_file, scratch) - set(layers))
    if odd:
        raise ConvertError(f"{mnn_file.name} has layers that {model_file.name} has not: {', '.join(odd[:3])}.")
    prove_embedding(model_file, [layer for layer in stored.values() if layer.is_embedding], folder)
    return Proof(len(stored), sum(layer.n * layer.k for layer in stored.values()))


def prove_plain(model_file: Path, mnn_file: Path, scratch: Path) -> Proof:
    """Compare every quantized MatMul of `model_file` with the convolution of its name; there may be others, in float.

    Raises:
        ConvertError: a layer is missing, or a code, scale or offset differs; names the first.
    """
    layers = read_layers(model_file)
    _prove_layers(layers, {}, mnn_file, scratch)
    return Proof(len(layers), sum(layer.n * layer.k for layer in layers.values()))


def _prove_layers(
    layers: dict[str, StoredLayer], biases: dict[str, npt.NDArray[np.float32]], mnn_file: Path, scratch: Path
) -> set[str]:
    """Compare all layers with the file's convolutions; returns the names of those."""
    weight_file = regular_file(mnn_file.with_name(f"{mnn_file.name}.weight"))
    graph = checked(Graph, read_json(mnn_file, scratch / "proof.json"), mnn_file.name)
    convolutions = {op.name: op.main for op in graph.operators if op.type == "Convolution"}
    if missing := sorted(set(layers) - set(convolutions)):
        raise ConvertError(f"{mnn_file.name} lacks {', '.join(missing[:3])}.")
    end = 0
    for name, layer in layers.items():
        convolution = checked(Convolution, convolutions[name], f"{mnn_file.name}: {name}")
        end = max(end, _prove_layer(layer, convolution, biases.get(name), weight_file))
    size = weight_file.stat().st_size
    if end != size:
        raise ConvertError(f"{weight_file.name} has {size} bytes, its layers end at {end}.")
    return set(convolutions)


def _prove_layer(layer: StoredLayer, main: Convolution, bias: npt.NDArray[np.float32] | None, weight_file: Path) -> int:
    """Compare one layer; returns where its last byte lies."""
    quantization = main.quantization
    offset, codes_size, alpha_size, bias_size = main.external[:4]
    bits, n, k = quantization.bits, main.common.n, main.common.k
    if (bits, n, k) != (layer.bits, layer.n, layer.padded_k):
        raise ConvertError(f"{layer.name}: MNN has {bits} bits, {n} x {k}; ONNX {layer.bits}, {layer.n} x {layer.padded_k}.")
    header = 1 + (8 if quantization.wide else 4) + 1 + (1 << bits)
    row_bits = k * bits
    if codes_size != header + -(-n * row_bits // 8):
        raise ConvertError(f"{layer.name}: MNN stores {codes_size} bytes of codes for {n} x {k} at {bits} bits.")
    half = quantization.scale_storage == "FP16"
    symmetric = quantization.read_type == 0
    shape = (n, layer.blocks) if symmetric else (n, layer.blocks, 2)
    alpha = Region(weight_file, offset + codes_size, shape, np.dtype(np.float16 if half else np.float32))
    if alpha_size != n * alpha.row_bytes:
        raise ConvertError(f"{layer.name}: MNN stores {alpha_size} bytes of scales, expected {n * alpha.row_bytes}.")
    prove_codes(layer, weight_file, offset + header)
    prove_alpha(layer, alpha, symmetric)
    _prove_bias(layer, bias, Region(weight_file, offset + codes_size + alpha_size, (bias_size // 4,), np.dtype(np.float32)))
    return int(offset + codes_size + alpha_size + bias_size)


def _prove_bias(layer: StoredLayer, ours: npt.NDArray[np.float32] | None, theirs: Region) -> None:
    expected = np.empty(0, np.float32) if ours is None else ours
    if theirs.shape != expected.shape or not np.array_equal(theirs.rows(0, theirs.shape[0]), expected):
        raise ConvertError(f"{layer.name}: its bias in {theirs.file.name} is not that of the ONNX file.")


def _biases(model_file: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Biases of the ONNX file by layer, float32."""
    tensors = [tensor for tensor in read_model(model_file).graph.initializer if tensor.name.endswith(".bias")]
    return {tensor.name.removesuffix(".bias"): _values(model_file, tensor).astype(np.float32) for tensor in tensors}


def _values(model_file: Path, tensor: TensorProto) -> npt.NDArray[Any]:
    if tensor.data_location == TensorProto.EXTERNAL:
        place = region(model_file, tensor)
        return place.rows(0, place.shape[0])
    try:
        return np.asarray(numpy_helper.to_array(tensor))
    except (ValueError, TypeError) as error:
        raise ConvertError(f"{model_file}: '{tensor.name}' cannot be read: {error}. Run the recipe again.") from error
