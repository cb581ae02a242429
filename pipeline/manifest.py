"""manifest.json: what was made, from what, how, and how good it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from passes._cores import in_order
from passes._quantized import QuantizedWeight
from passes._weights import Weight
from pipeline.checkpoint import Checkpoint
from pipeline.errors import PipelineError
from pipeline.recipe import Recipe
from pipeline.steps import Record
from pipeline.store import Entry, sha256, versions

MANIFEST = "manifest.json"
PACKAGES = (
    "MNN", "numba", "numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-genai", "optimum", "optimum-onnx",
    "tokenizers", "torch", "transformers",
)  # fmt: skip


def write_manifest(
    work: Path,
    recipe: Recipe,
    checkpoint: Checkpoint,
    steps: list[Record],
    quality: dict[str, Any],
    hand_offs: dict[str, dict[str, Any]],
    model: dict[str, Any],
    weights: dict[QuantizedWeight, Entry],
    source_of: Callable[[Weight], str],
) -> dict[str, Any]:
    """Write manifest.json beside the results in `work` and return what it says.

    SHA-256 by SHA-256 it leads from the tensors of each shard (`model`, `source_of` a weight) to codes to files.
    """
    stored = sum(part.nbytes for weight in weights for part in weight.parts.values())
    count = sum(weight.source.shape[0] * weight.source.shape[1] for weight in weights)
    paths = sorted(p for p in work.rglob("*") if p.is_file())
    files = dict(zip((str(p.relative_to(work)) for p in paths), in_order(sha256, paths), strict=True))
    manifest = {
        "recipe": recipe.name,
        "model": {"source": checkpoint.source, "revision": checkpoint.revision, **model},
        "versions": versions(PACKAGES),
        "steps": [asdict(record) for record in steps],
        "weights": {weight.name: _weight(weight, source_of(weight.source), entry) for weight, entry in weights.items()},
        "size": {
            **{f"{folder}_bytes": _bytes(work / folder) for folder in ("onnx", *hand_offs)},
            "bits_per_weight": 8 * stored / count,
        },
        "quality": quality,
        "hand_offs": hand_offs,
        "files": files,
    }  # fmt: skip
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")
    return manifest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished folder.

    Raises:
        PipelineError: there is none, or it is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise PipelineError(f"{folder}: no {MANIFEST}, so no run has finished here.")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise PipelineError(f"{path}: damaged: {error}") from error
    if not isinstance(manifest, dict) or not {"files", "weights", "hand_offs"} <= set(manifest):
        raise PipelineError(f"{path}: damaged: it is not a manifest of a finished run.")
    return manifest


def _weight(weight: QuantizedWeight, source: str, entry: Entry) -> dict[str, Any]:
    form = weight.form
    return {
        "shape": list(weight.source.shape), "bits": form.bits, "block_size": form.block_size, "symmetric": form.symmetric,
        "zero_point": form.zero_point, "method": weight.made_by, "mse": entry.facts["mse"],
        "bits_per_weight": form.bits_per_weight(weight.source.shape[1]), "source_sha256": source,
        "codes_sha256": entry.files["codes"],
    }  # fmt: skip


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
