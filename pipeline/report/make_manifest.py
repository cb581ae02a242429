"""A finished run -> its manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.gates import gates
from lowbit.pipeline.report.manifest import MANIFEST, VERSION, Manifest
from lowbit.pipeline.report.progress import Record
from lowbit.pipeline.report.quality import Quality
from lowbit.pipeline.report.records import HandOff, Size, Source, StepRecord, WeightRecord
from lowbit.pipeline.store.digests import sha256, versions
from lowbit.pipeline.store.store import Entry

PACKAGES = (
    "numba", "numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "optimum", "optimum-onnx", "tokenizers", "torch",
    "transformers",
)  # fmt: skip
"""What every result depends on."""


def make_manifest(
    work: Path,
    recipe: Recipe,
    checkpoint: Checkpoint,
    steps: list[Record],
    quality: Quality,
    hand_offs: dict[str, HandOff],
    model: Source,
    weights: Mapping[QuantizedWeight, Entry],
    source_of: Callable[[Weight], str],
    engines: Iterable[str],
) -> Manifest:
    """What manifest.json says of the results in `work`, sealed, but for the hashes of its files.

    SHA-256 by SHA-256 it leads from the tensors of each shard (`model`, `source_of` a weight) to codes.

    Args:
        engines: packages whose versions count beside our own.
    """
    stored = sum(part.nbytes for weight in weights for part in weight.parts.values())
    count = sum(weight.source.shape[0] * weight.source.shape[1] for weight in weights)
    sizes = {f"{folder}_bytes": bytes_in(work / folder) for folder in ("onnx", *hand_offs)}
    manifest = Manifest(
        version=VERSION,
        recipe=recipe.name,
        model=model,
        versions=versions({*PACKAGES, *engines}),
        steps=tuple(StepRecord(**dict(record)) for record in steps),
        weights={weight.name: _weight(weight, source_of(weight.source), entry) for weight, entry in weights.items()},
        size=Size(bits_per_weight=8 * stored / count, **sizes),
        quality=quality,
        hand_offs=hand_offs,
        model_type=checkpoint.config.get("model_type"),
        recipe_text=recipe.text,
        gates=gates(recipe.validate, quality) if recipe.validate else (),
        files={},
    )
    return manifest.model_copy(update={"seal": manifest.digest})


def seal_manifest(work: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json beside the results in `work`, with the SHA-256 of every file that is there by now."""
    paths = sorted(p for p in work.rglob("*") if p.is_file())
    files = dict(zip((str(p.relative_to(work)) for p in paths), in_order(sha256, paths), strict=True))
    whole = manifest.model_copy(update={"files": files})
    (work / MANIFEST).write_text(whole.text, "utf-8")
    return whole


def _weight(weight: QuantizedWeight, source: str, entry: Entry) -> WeightRecord:
    form = weight.form
    n, k = weight.source.shape
    return WeightRecord(
        shape=(n, k), bits=form.bits, block_size=form.block_size, symmetric=form.symmetric, zero_point=form.zero_point,
        method=weight.made_by, mse=entry.facts["mse"], relative_error=entry.facts["relative_error"],
        bits_per_weight=form.bits_per_weight(k), source_sha256=source, codes_sha256=entry.files["codes"],
    )  # fmt: skip


def bytes_in(folder: Path) -> int:
    """Bytes of all files in a folder of a result; none if it is not there."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
