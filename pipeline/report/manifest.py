"""manifest.json: what was made, from what, how, and how good it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.report.progress import Record
from lowbit.pipeline.store.digests import sha256, versions
from lowbit.pipeline.store.store import Entry

MANIFEST = "manifest.json"
PACKAGES = (
    "MNN", "numba", "numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "onnxruntime-genai", "optimum", "optimum-onnx",
    "tokenizers", "torch", "transformers",
)  # fmt: skip


def make_manifest(
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
    """What manifest.json says of the results in `work`, but for the hashes of its files.

    SHA-256 by SHA-256 it leads from the tensors of each shard (`model`, `source_of` a weight) to codes.
    """
    stored = sum(part.nbytes for weight in weights for part in weight.parts.values())
    count = sum(weight.source.shape[0] * weight.source.shape[1] for weight in weights)
    return {
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
        "model_type": checkpoint.config.get("model_type"),
        "recipe_text": recipe.text,
        "gates": gates(recipe.validate, quality.get("onnxruntime", {})) if recipe.validate else [],
    }  # fmt: skip


def seal_manifest(work: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json beside the results in `work`, with the SHA-256 of every file that is there by now."""
    paths = sorted(p for p in work.rglob("*") if p.is_file())
    manifest["files"] = dict(zip((str(p.relative_to(work)) for p in paths), in_order(sha256, paths), strict=True))
    (work / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")


def gates(options: Validate, quality: dict[str, Any]) -> list[dict[str, Any]]:
    """Every gate of the recipe: its `name`, what is `allowed`, what was `found`, whether it was `passed`."""
    found_of = {
        "max_kl_divergence": quality.get("kl_divergence"),
        "max_perplexity_ratio": "perplexity" in quality and quality["perplexity"] / quality["reference_perplexity"],
        "max_relative_error": max((one["relative_error"] for one in quality.get("outputs", {}).values()), default=None),
    }
    return [
        {"name": name, "allowed": limit, "found": found, "passed": bool(found is not None and found <= limit)}
        for name, found in found_of.items()
        if (limit := getattr(options, name)) is not None
    ]


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
    if "gates" not in manifest:
        raise PipelineError(f"{path}: made by an earlier version. Run the recipe again; what is known already is recalled.")
    return manifest


def _weight(weight: QuantizedWeight, source: str, entry: Entry) -> dict[str, Any]:
    form = weight.form
    return {
        "shape": list(weight.source.shape), "bits": form.bits, "block_size": form.block_size, "symmetric": form.symmetric,
        "zero_point": form.zero_point, "method": weight.made_by, "mse": entry.facts["mse"],
        "relative_error": entry.facts["relative_error"],
        "bits_per_weight": form.bits_per_weight(weight.source.shape[1]), "source_sha256": source,
        "codes_sha256": entry.files["codes"],
    }  # fmt: skip


def _bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
