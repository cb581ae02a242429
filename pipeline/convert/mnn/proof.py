"""The proof: every code, scale and zero point of the MNN file against those of the ONNX file.

Both files are decoded here bit by bit from their definitions, sharing nothing with the code that packed
them. What the MNN file claims about itself (offsets, bits, shapes) is read from the final llm.mnn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from lowbit.pipeline.convert.base import Proof
from lowbit.pipeline.convert.mnn.converter import read_json
from lowbit.pipeline.convert.mnn.proof_codes import prove_alpha, prove_codes
from lowbit.pipeline.convert.mnn.proof_embedding import prove_embedding
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.reader import read_layers
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
    odd = sorted(set(_prove_layers(layers, _biases(model_file), mnn_file, scratch)) - set(layers))
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
) -> dict[str, Any]:
    """Compare all layers with the file's convolutions; returns those."""
    weight_file = mnn_file.with_name(f"{mnn_file.name}.weight")
    document = read_json(mnn_file, scratch / "proof.json")
    convolutions = {op["name"]: op["main"] for op in document["oplists"] if op["type"] == "Convolution"}
    if missing := sorted(set(layers) - set(convolutions)):
        raise ConvertError(f"{mnn_file.name} lacks {', '.join(missing[:3])}.")
    end = 0
    for name, layer in layers.items():
        end = max(end, _prove_layer(layer, convolutions[name], biases.get(name), weight_file))
    size = weight_file.stat().st_size
    if end != size:
        raise ConvertError(f"{weight_file.name} has {size} bytes, its layers end at {end}.")
    return convolutions


def _prove_layer(layer: StoredLayer, main: dict[str, Any], bias: npt.NDArray[np.float32] | None, weight_file: Path) -> int:
    """Compare one layer; returns where its last byte lies."""
    quantization, common = main["quanParameter"], main["common"]
    offset, codes_size, alpha_size, bias_size = main["external"][:4]
    bits, n, k = quantization["aMaxOrBits"], common["outputCount"], common["inputCount"]
    if (bits, n, k) != (layer.bits, layer.n, layer.padded_k):
        raise ConvertError(f"{layer.name}: MNN has {bits} bits, {n} x {k}; ONNX {layer.bits}, {layer.n} x {layer.padded_k}.")
    header = 1 + (8 if quantization.get("shapeInt32") else 4) + 1 + (1 << bits)
    row_bits = k * bits
    if codes_size != header + -(-n * row_bits // 8):
        raise ConvertError(f"{layer.name}: MNN stores {codes_size} bytes of codes for {n} x {k} at {bits} bits.")
    half = quantization.get("scaleStorage") == "FP16"
    symmetric = quantization["readType"] == 0
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
    if not np.array_equal(theirs.rows(0, theirs.shape[0]), expected):
        raise ConvertError(f"{layer.name}: its bias in {theirs.file.name} is not that of the ONNX file.")


def _biases(model_file: Path) -> dict[str, npt.NDArray[np.float32]]:
    """Biases of the ONNX file by layer, float32."""
    model = onnx.load(str(model_file), load_external_data=False)
    onnx.load_external_data_for_model(
        kept := onnx.ModelProto(
            graph=onnx.GraphProto(initializer=[t for t in model.graph.initializer if t.name.endswith(".bias")])
        ),
        str(model_file.parent),
    )
    return {t.name.removesuffix(".bias"): numpy_helper.to_array(t).astype(np.float32) for t in kept.graph.initializer}
