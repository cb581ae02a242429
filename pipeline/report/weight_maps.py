"""Every weight at a glance: where the bytes went, and maps of bits and errors, layers by projections."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable

import numpy as np

from lowbit.passes.graph.names import LAYER
from lowbit.pipeline.report.charts import map_figure
from lowbit.pipeline.report.drawing import svg
from lowbit.pipeline.report.manifest import Manifest
from lowbit.pipeline.report.records import WeightRecord


def bytes_by_kind(manifest: Manifest) -> dict[str, int]:
    """Bytes of the ONNX folder by kind of layer; the rest is what stays float, the graph and the tokenizer."""
    parts: dict[str, int] = defaultdict(int)
    for name, weight in manifest.weights.items():
        parts[_kind(name)] += round(math.prod(weight.shape) * weight.bits_per_weight / 8)
    return {**parts, "float, graph, tokenizer": max(0, manifest.size.onnx_bytes - sum(parts.values()))}


def weight_maps(manifest: Manifest) -> dict[str, str]:
    """Maps of `bits` and `errors` as SVG; none where the model has no layers."""
    cells = {(_layer(name), _kind(name)): weight for name, weight in manifest.weights.items()}
    rows = sorted({row for row, _ in cells}, key=lambda row: int(row or 1 << 30))
    columns = list(dict.fromkeys(column for _, column in cells))
    if not any(rows):
        return {}

    def drawn(value: Callable[[WeightRecord], float], text: Callable[[WeightRecord], str], colors: str) -> str:
        grid = [[cells.get((row, column)) for column in columns] for row in rows]
        values = np.array([[np.nan if weight is None else value(weight) for weight in row] for row in grid])
        texts = [["" if weight is None else text(weight) for weight in row] for row in grid]
        return svg(map_figure([row or "after" for row in rows], columns, values, texts, colors))

    return {
        "bits": drawn(lambda weight: weight.bits, lambda weight: f"{weight.bits}/{weight.block_size}", "RdYlGn"),
        "errors": drawn(lambda weight: weight.relative_error, lambda weight: f"{weight.relative_error:.3f}", "YlOrRd"),
    }


def _layer(name: str) -> str:
    """The number of the layer that a weight belongs to; empty for one outside of layers."""
    layer = LAYER.search(f"{name}.")
    return layer.group(1) if layer else ""


def _kind(name: str) -> str:
    return name.rpartition(".")[2].removesuffix("_proj")
