"""The proof for onnxruntime-genai: every weight of its file against the ONNX file that it was made from."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np
import onnx
from onnx import TensorProto

from passes._cores import in_order
from passes._weights import rows_per_chunk
from pipeline.convert.mnn_proof import decode_row
from pipeline.convert.target import Proof
from pipeline.errors import ConvertError
from pipeline.onnx_weights import Region, StoredLayer, read_layers, region


def prove(model_file: Path, target_file: Path) -> Proof:
    """Compare every quantized layer of `model_file` with that of its name, and every other weight that both have.

    Raises:
        ConvertError: a layer is missing, or a code, scale, offset or other weight differs; names the first.
    """
    ours, theirs = read_layers(model_file), read_layers(target_file)
    if set(ours) != set(theirs):
        odd = sorted(set(ours) ^ set(theirs))
        raise ConvertError(f"{target_file} and {model_file} do not have the same layers: {', '.join(odd[:3])}.")
    for name, layer in ours.items():
        _prove_layer(layer, theirs[name])
    _prove_others(model_file, target_file)
    return Proof(len(ours), sum(layer.n * layer.k for layer in ours.values()))


def _prove_layer(ours: StoredLayer, theirs: StoredLayer) -> None:
    def shape(layer: StoredLayer) -> tuple[object, ...]:
        return layer.n, layer.k, layer.block_size, layer.is_embedding, layer.offsets is None

    if shape(ours) != shape(theirs) or (ours.bits, theirs.bits) not in ((ours.bits, ours.bits), (3, 4)):
        raise ConvertError(
            f"{ours.name}: {theirs.codes.file} has {theirs.bits} bits, {theirs.n} x {theirs.k} in blocks of "
            f"{theirs.block_size}; {ours.codes.file} has {ours.bits}, {ours.n} x {ours.k} in {ours.block_size}."
        )

    def compare(rows: tuple[int, int]) -> int:
        count = rows[1] - rows[0]
        packed = [layer.codes.rows(*rows).reshape(count, -1) for layer in (ours, theirs)]
        wrong = int(first_difference(packed[0], ours.bits, packed[1], theirs.bits, ours.padded_k))
        return wrong if wrong < 0 else rows[0] * ours.padded_k + wrong

    for wrong in in_order(compare, ours.row_ranges()):
        if wrong >= 0:
            row, column = divmod(wrong, ours.padded_k)
            raise ConvertError(f"{ours.name}: the code of weight [{row}, {column}] differs in {theirs.codes.file}.")
    for part in ("scales", "zero_points", "offsets"):
        _prove_equal(f"{ours.name}: its {part}", getattr(ours, part), getattr(theirs, part))


def _prove_others(model_file: Path, target_file: Path) -> None:
    """Biases, a float embedding: what is no part of a layer, by name; what only the target has was computed from norms."""
    found = [onnx.load(str(file), load_external_data=False).graph.initializer for file in (model_file, target_file)]
    parts = (".codes", ".scales", ".zero_points", ".offsets")
    ours, theirs = (
        {t.name: t for t in tensors if t.data_location == TensorProto.EXTERNAL and not t.name.endswith(parts)}
        for tensors in found
    )
    for name in set(ours) & set(theirs):
        _prove_equal(name, region(model_file, ours[name]), region(target_file, theirs[name]))


def _prove_equal(what: str, ours: Region | None, theirs: Region | None) -> None:
    if ours is None or theirs is None:
        if ours is not theirs:
            raise ConvertError(f"{what} are in one file only.")
        return
    if (ours.shape, ours.dtype) != (theirs.shape, theirs.dtype):
        raise ConvertError(f"{what}: {theirs.file} has {theirs.shape}, {theirs.dtype}; expected {ours.shape}, {ours.dtype}.")
    count = ours.shape[0] if ours.shape else 1
    for start in range(0, count, step := rows_per_chunk(ours.row_bytes)):
        stop = min(start + step, count)
        if ours.rows(start, stop).tobytes() != theirs.rows(start, stop).tobytes():
            raise ConvertError(f"{what} differ in rows {start} to {stop} of {theirs.file}.")


@numba.njit(cache=True, nogil=True, error_model="numpy")
def first_difference(ours, our_bits, theirs, their_bits, k):  # type: ignore[no-untyped-def]
    """Index in row-major order of the first code that differs, or -1; packed rows uint8 [rows, bytes] of k codes each."""
    left, right = np.empty(k, np.uint8), np.empty(k, np.uint8)
    for row in range(ours.shape[0]):
        decode_row(ours[row], our_bits, left)
        decode_row(theirs[row], their_bits, right)
        for i in range(k):
            if left[i] != right[i]:
                return row * k + i
    return -1
