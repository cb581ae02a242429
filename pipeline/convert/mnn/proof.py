"""The proof: every code, scale and zero point of the MNN file against those of the ONNX file.

Both files are decoded here bit by bit from their definitions, sharing nothing with the code that packed
them. What the MNN file claims about itself (offsets, bits, shapes) is read from the final llm.mnn.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from lowbit.passes.quant.parallel import in_order
from lowbit.pipeline.convert.base import Proof
from lowbit.pipeline.convert.decode import decode_row
from lowbit.pipeline.convert.mnn.converter import read_json
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.reader import read_layers, region
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
    embeddings = [layer for layer in stored.values() if layer.is_embedding]
    for layer in embeddings:
        _prove_embedding(layer, folder)
    if not embeddings:
        _prove_float_embedding(model_file, folder)
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
    _prove_codes(layer, weight_file, offset + header)
    _prove_alpha(layer, alpha, symmetric)
    _prove_bias(layer, bias, Region(weight_file, offset + codes_size + alpha_size, (bias_size // 4,), np.dtype(np.float32)))
    return int(offset + codes_size + alpha_size + bias_size)


def _prove_codes(layer: StoredLayer, file: Path, first: int) -> None:
    """Compare the layer's codes with the bit stream that begins at byte `first` of `file`."""
    bits, k = layer.bits, layer.padded_k

    def compare(rows: tuple[int, int]) -> int:
        start, stop = rows
        stream = np.fromfile(file, np.uint8, -(-(stop - start) * k * bits // 8), offset=first + start * k * bits // 8)
        wrong = int(compare_codes(layer.codes.rows(start, stop).reshape(stop - start, -1), stream, bits, k))
        return wrong if wrong < 0 else start * k + wrong

    for wrong in in_order(compare, layer.row_ranges()):
        if wrong >= 0:
            raise ConvertError(
                f"{layer.name}: the code of weight [{wrong // k}, {wrong % k}] differs between "
                f"{layer.codes.file.name} and {file.name}."
            )


def _prove_alpha(layer: StoredLayer, alpha: Region, symmetric: bool) -> None:
    """Compare the layer's scales and zero points with MNN's (offset, scale), or scale alone."""
    if symmetric != layer.symmetric:
        raise ConvertError(f"{layer.name}: one file has zero points, the other has none.")

    def compare(rows: tuple[int, int]) -> None:
        start, stop = rows
        found = alpha.rows(start, stop).astype(np.float64)
        scales = layer.scales.rows(start, stop).astype(np.float64)
        middle = 1 << (layer.bits - 1)
        zeros = np.full(scales.shape, float(middle))
        if layer.zero_points is not None:
            packed = layer.zero_points.rows(start, stop)
            width = 8 * layer.zero_points.shape[1] // layer.blocks if layer.bits == 8 else (2 if layer.bits == 2 else 4)
            stream = np.unpackbits(packed, axis=1, bitorder="little")[:, : layer.blocks * width]
            zeros = (stream.reshape(stop - start, layer.blocks, width) << np.arange(width)).sum(-1).astype(np.float64)
        offsets = (middle - zeros) * scales if layer.offsets is None else layer.offsets.rows(start, stop).astype(np.float64)
        pairs = [(found, scales)] if symmetric else [(found[..., 1], scales), (found[..., 0], offsets)]
        for what, (theirs, ours) in zip(("scale", "offset"), pairs, strict=False):
            if not np.array_equal(theirs, ours):
                row, block = np.argwhere(theirs != ours)[0]
                raise ConvertError(
                    f"{layer.name}: the {what} of row {start + row}, block {block} is {theirs[row, block]!r} in "
                    f"{alpha.file.name}, {ours[row, block]!r} in {layer.scales.file.name}."
                )

    for _ in in_order(compare, layer.row_ranges()):
        pass


def _prove_bias(layer: StoredLayer, ours: npt.NDArray[np.float32] | None, theirs: Region) -> None:
    expected = np.empty(0, np.float32) if ours is None else ours
    if not np.array_equal(theirs.rows(0, theirs.shape[0]), expected):
        raise ConvertError(f"{layer.name}: its bias in {theirs.file.name} is not that of the ONNX file.")


def _prove_embedding(layer: StoredLayer, folder: Path) -> None:
    """Compare a quantized embedding with the file that llm_config.json describes."""
    place = json.loads((folder / "llm_config.json").read_text("utf-8"))["tie_embeddings"]
    file = folder / json.loads((folder / "config.json").read_text("utf-8"))["embedding_file"]
    if (place["quant_bit"], place["quant_block"]) != (layer.bits, layer.block_size):
        raise ConvertError(f"{layer.name}: llm_config.json gives it {place['quant_bit']} bits, block {place['quant_block']}.")
    dtype = np.dtype(np.float16 if place["alpha_dtype"] == "fp16" else np.float32)
    alpha = Region(file, place["alpha_offset"], (layer.n, layer.blocks, 2), dtype)
    if place["alpha_offset"] + layer.n * alpha.row_bytes != file.stat().st_size:
        raise ConvertError(f"{file.name} does not end where its scales do.")
    _prove_codes(layer, file, place["weight_offset"])
    _prove_alpha(layer, alpha, symmetric=False)


def _prove_float_embedding(model_file: Path, folder: Path) -> None:
    """Compare a half-precision table with MNN's file, byte for byte."""
    model = onnx.load(str(model_file), load_external_data=False)
    lookup = next(node for node in model.graph.node if node.op_type == "Gather" and "input_ids" in node.input)
    table = region(model_file, next(t for t in model.graph.initializer if t.name == lookup.input[0]))
    file = folder / json.loads((folder / "config.json").read_text("utf-8"))["embedding_file"]
    theirs = replace(table, file=file, offset=0)
    if file.stat().st_size != table.shape[0] * table.row_bytes:
        raise ConvertError(f"{file.name} has {file.stat().st_size} bytes, expected {table.shape[0] * table.row_bytes}.")
    for start in range(0, table.shape[0], 4096):
        stop = min(start + 4096, table.shape[0])
        if not np.array_equal(table.rows(start, stop).view(np.uint16), theirs.rows(start, stop).view(np.uint16)):
            raise ConvertError(f"{file.name}: the embedding differs from '{lookup.input[0]}' in rows {start} to {stop}.")


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


@numba.njit(cache=True, nogil=True, error_model="numpy")
def compare_codes(packed, stream, bits, k):  # type: ignore[no-untyped-def]
    """Index in row-major order of the first code that differs, or -1.

    Args:
        packed: uint8 [rows, bytes], rows of the ONNX file.
        stream: uint8, the same rows in MNN's stream, most significant bit first: eight codes are `bits` bytes.
        k: codes in a row, a multiple of 8.
    """
    codes = np.empty(k, np.uint8)
    mask = np.uint64((1 << bits) - 1)
    for row in range(packed.shape[0]):
        decode_row(packed[row], bits, codes)
        for group in range(k // 8):
            start = (row * (k // 8) + group) * bits
            word = np.uint64(0)
            for byte in stream[start : start + bits]:
                word = word << np.uint64(8) | np.uint64(byte)
            eight = codes[8 * group : 8 * group + 8]
            for i in range(8):
                if np.uint64(eight[i]) != (word >> np.uint64(bits * (7 - i))) & mask:
                    return row * k + 8 * group + i
    return -1
