"""The embedding's file against the table in the ONNX file, quantized or in half precision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from lowbit.pipeline.convert.mnn.proof_codes import prove_alpha, prove_codes
from lowbit.pipeline.convert.mnn.proof_schema import ModelFacts, RunFacts, read_part
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.onnx_io.reader import plain_file, read_model, region
from lowbit.pipeline.onnx_io.stored_layer import Region, StoredLayer


def prove_embedding(model_file: Path, quantized: list[StoredLayer], folder: Path) -> None:
    """Compare the embedding of MNN's `folder` with the `quantized` ones of `model_file`, or with its float table.

    Raises:
        ConvertError: it differs; names the first place.
    """
    for layer in quantized:
        _prove_quantized(layer, folder)
    if not quantized:
        _prove_float(model_file, folder)


def _prove_quantized(layer: StoredLayer, folder: Path) -> None:
    """Compare a quantized embedding with the file that llm_config.json describes."""
    place = read_part(ModelFacts, folder / "llm_config.json").table
    file = _embedding_file(folder)
    if (place.bits, place.block_size) != (layer.bits, layer.block_size):
        raise ConvertError(f"{layer.name}: llm_config.json gives it {place.bits} bits, block {place.block_size}.")
    dtype = np.dtype(np.float16 if place.alpha_dtype == "fp16" else np.float32)
    alpha = Region(file, place.alpha_offset, (layer.n, layer.blocks, 2), dtype)
    if place.alpha_offset + layer.n * alpha.row_bytes != file.stat().st_size:
        raise ConvertError(f"{file.name} does not end where its scales do.")
    prove_codes(layer, file, place.weight_offset)
    prove_alpha(layer, alpha, symmetric=False)


def _prove_float(model_file: Path, folder: Path) -> None:
    """Compare a half-precision table with MNN's file, byte for byte."""
    graph = read_model(model_file).graph
    lookup = next((node for node in graph.node if node.op_type == "Gather" and "input_ids" in node.input), None)
    tensor = next((t for t in graph.initializer if lookup is not None and t.name == lookup.input[0]), None)
    if lookup is None or tensor is None:
        raise ConvertError(f"{model_file}: has no table that input_ids are looked up in. Run the recipe again.")
    table = region(model_file, tensor)
    file = _embedding_file(folder)
    theirs = replace(table, file=file, offset=0)
    if file.stat().st_size != table.shape[0] * table.row_bytes:
        raise ConvertError(f"{file.name} has {file.stat().st_size} bytes, expected {table.shape[0] * table.row_bytes}.")
    for start in range(0, table.shape[0], 4096):
        stop = min(start + 4096, table.shape[0])
        if not np.array_equal(table.rows(start, stop).view(np.uint16), theirs.rows(start, stop).view(np.uint16)):
            raise ConvertError(f"{file.name}: the embedding differs from '{lookup.input[0]}' in rows {start} to {stop}.")


def _embedding_file(folder: Path) -> Path:
    return plain_file(folder, read_part(RunFacts, folder / "config.json").embedding_file, folder / "config.json")
