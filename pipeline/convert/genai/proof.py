"""The proof for onnxruntime-genai: every weight of its file against the ONNX file that it was made from."""

from __future__ import annotations

from pathlib import Path

import numba
import numpy as np
from onnx import TensorProto

from lowbit.passes.quant import kernel_cache  # noqa: F401  (before any kernel is made)
from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.weights import rows_per_chunk
from lowbit.pipeline.convert.base import Proof
from lowbit.pipeline.convert.decode import decode_row
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.reader import read_layers, read_model, region
from lowbit.pipeline.onnx_io.stored_layer import Region, StoredLayer

PACKED = "qkv_proj"
PARTS = (".codes", ".scales", ".zero_points", ".offsets")


def prove(model_file: Path, target_file: Path) -> Proof:
    """Compare every quantized layer of `model_file` with its rows in `target_file`, and every other weight that both have.

    There, `qkv_proj` holds the rows of q_proj, k_proj and v_proj, one after the other; three-bit codes may be nibbles.

    Raises:
        ConvertError: a layer is missing, or a code, scale, offset or other weight differs; names the first.
    """
    ours, theirs = read_layers(model_file), read_layers(target_file)
    found: set[str] = set()
    for name, layer in theirs.items():
        start = 0
        for part in _parts(name):
            if part not in ours:
                raise ConvertError(f"{target_file} has a layer '{part}', which {model_file} has not.")
            _prove_layer(ours[part], layer, start)
            start += ours[part].n
            found.add(part)
        if start != layer.n:
            raise ConvertError(f"{name}: {target_file} has {layer.n} rows, expected {start}.")
    if missing := sorted(set(ours) - found):
        raise ConvertError(f"{target_file} lacks {', '.join(missing[:3])}.")
    _prove_others(model_file, target_file)
    return Proof(len(ours), sum(layer.n * layer.k for layer in ours.values()))


def _parts(name: str) -> list[str]:
    """The layers of the checkpoint that a layer of the target holds."""
    prefix = name.removesuffix(PACKED)
    return [name] if prefix == name else [f"{prefix}{part}_proj" for part in "qkv"]


def _prove_layer(ours: StoredLayer, theirs: StoredLayer, start: int) -> None:
    """Compare a layer with rows of another, the first of them row `start`."""

    def form(layer: StoredLayer) -> tuple[object, ...]:
        return layer.k, layer.block_size, layer.is_embedding

    if form(ours) != form(theirs) or (ours.bits, theirs.bits) not in ((ours.bits, ours.bits), (3, 4)):
        raise ConvertError(
            f"{ours.name}: {theirs.codes.file} has {theirs.bits} bits, {theirs.k} columns in blocks of {theirs.block_size}; "
            f"{ours.codes.file} has {ours.bits}, {ours.k} in {ours.block_size}."
        )

    def compare(rows: tuple[int, int]) -> int:
        count = rows[1] - rows[0]
        left = ours.codes.rows(*rows).reshape(count, -1)
        right = theirs.codes.rows(start + rows[0], start + rows[1]).reshape(count, -1)
        wrong = int(first_difference(left, ours.bits, right, theirs.bits, ours.padded_k))
        return wrong if wrong < 0 else rows[0] * ours.padded_k + wrong

    for wrong in in_order(compare, ours.row_ranges()):
        if wrong >= 0:
            row, column = divmod(wrong, ours.padded_k)
            raise ConvertError(f"{ours.name}: the code of weight [{row}, {column}] differs in {theirs.codes.file}.")
    for part in ("scales", "zero_points", "offsets"):
        _prove_equal(f"{ours.name}: its {part}", getattr(ours, part), getattr(theirs, part), start)


def _prove_others(model_file: Path, target_file: Path) -> None:
    """Biases, a float embedding: what is no part of a layer, by name; what only the target has was computed from norms."""
    found = [read_model(file).graph.initializer for file in (model_file, target_file)]
    ours, theirs = (
        {t.name: t for t in tensors if t.data_location == TensorProto.EXTERNAL and not t.name.endswith(PARTS)}
        for tensors in found
    )
    for name, tensor in theirs.items():
        start = 0
        for part in [f"{one}.bias" for one in _parts(name.removesuffix(".bias"))] if name.endswith(".bias") else [name]:
            if part in ours:
                source = region(model_file, ours[part])
                _prove_equal(part, source, region(target_file, tensor), start)
                start += source.shape[0]


def _prove_equal(what: str, ours: Region | None, theirs: Region | None, first: int) -> None:
    """Compare a tensor with rows of another, the first of them row `first`."""
    if ours is None or theirs is None:
        if ours is not theirs:
            raise ConvertError(f"{what} are in one file only.")
        return
    if (ours.shape[1:], ours.dtype) != (theirs.shape[1:], theirs.dtype):
        raise ConvertError(f"{what}: {theirs.file} has {theirs.shape}, {theirs.dtype}; expected {ours.shape}, {ours.dtype}.")
    for start in range(0, ours.shape[0], step := rows_per_chunk(ours.row_bytes)):
        stop = min(start + step, ours.shape[0])
        if ours.rows(start, stop).tobytes() != theirs.rows(first + start, first + stop).tobytes():
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
