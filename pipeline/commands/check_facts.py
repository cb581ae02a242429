"""What a manifest says of a finished folder -> the first thing that its files do not bear out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.parallel import in_order
from lowbit.passes.quant.weights import ROW_CHUNK_BYTES
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.onnx_io.reader import read_layers
from lowbit.pipeline.onnx_io.stored_layer import Region, StoredLayer
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.report.log import LOG
from lowbit.pipeline.report.make_manifest import bytes_in
from lowbit.pipeline.report.manifest import MANIFEST, Manifest
from lowbit.pipeline.run.workspace import RESOLVED

BESIDE = {MANIFEST, LOG, ".lock"}
"""Files of the folder that are no part of the result."""
ALWAYS = {"recipe.yaml", "report.html", "README.md", f"onnx/{MODEL}"}
"""Files that every result has."""
AGAIN = "Run the recipe again; what is known already is recalled."


def check_seal(folder: Path, manifest: Manifest) -> None:
    """Require that manifest.json is what was sealed, to the byte, and that report.html shows the same seal."""
    path, report = folder / MANIFEST, folder / "report.html"
    if manifest.seal != manifest.digest or path.read_bytes() != manifest.text.encode():
        raise PipelineError(f"{path}: changed since the run; what it says is not what was sealed. {AGAIN}")
    if report.is_file() and manifest.seal not in report.read_text("utf-8", errors="replace"):
        raise PipelineError(f"{report}: changed since the run; it shows another seal than {MANIFEST}. {AGAIN}")


def check_names(folder: Path, manifest: Manifest) -> None:
    """Require that every file is one that the manifest names, and none is a link; a run under way may work beside them."""
    if lacking := sorted(ALWAYS - set(manifest.files)):
        raise PipelineError(f"{folder / MANIFEST}: it does not name {lacking[0]}, which every result has. {AGAIN}")
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if Path(name).parts[0].startswith(".work-"):
            continue
        if path.is_symlink():
            raise PipelineError(f"{path}: a link, and no run makes one. {AGAIN}")
        if not path.is_dir() and name not in manifest.files and name not in BESIDE:
            raise PipelineError(
                f"{path}: not of this result, the manifest does not name it. Remove it, or run the recipe again."
            )


def check_facts(folder: Path, manifest: Manifest) -> None:
    """Require that sizes, the recipe and everything that is said of a weight's form and codes are what the files hold."""
    for what, said, found in _facts(folder, manifest):
        same = math.isclose(said, found, rel_tol=1e-9) if isinstance(said, float) else said == found
        if not same:
            raise PipelineError(f"{folder / MANIFEST}: {what} is {said!r:.80}, the files say {found!r:.80}. {AGAIN}")


def _facts(folder: Path, manifest: Manifest) -> Iterator[tuple[str, Any, Any]]:
    """What the manifest says and what was found, each with its place in the manifest."""
    for name in manifest.folders:
        yield f"size.{name}_bytes", manifest.size.of(name), bytes_in(folder / name)
    recipe = folder / RESOLVED if RESOLVED in manifest.files else folder / "recipe.yaml"
    yield "recipe_text", manifest.recipe_text, recipe.read_bytes().decode("utf-8", errors="replace")
    layers = read_layers(folder / "onnx" / MODEL)
    yield "weights", sorted(manifest.weights), sorted(layers)
    codes = in_order(_sha256, (layers[name].codes for name in manifest.weights))
    for (name, record), sha256 in zip(manifest.weights.items(), codes, strict=True):
        found = {**_form(layers[name]), "codes_sha256": sha256}
        yield from ((f"weights.{name}.{key}", getattr(record, key), value) for key, value in found.items())
    counts = [math.prod(record.shape) for record in manifest.weights.values()]
    stored = sum(record.bits_per_weight * n for record, n in zip(manifest.weights.values(), counts, strict=True))
    yield "size.bits_per_weight", manifest.size.bits_per_weight, stored / sum(counts)


def _form(layer: StoredLayer) -> dict[str, Any]:
    """How a weight is stored, as its record says it."""
    scale_dtype, kind = "fp16" if layer.scales.dtype == np.float16 else "fp32", "integer" if layer.offsets is None else "float"
    form = BlockFormat(layer.bits, layer.block_size, layer.symmetric, scale_dtype, kind)  # type: ignore[arg-type]
    return {
        "shape": (layer.n, layer.k), "bits": form.bits, "block_size": form.block_size, "symmetric": form.symmetric,
        "zero_point": form.zero_point, "bits_per_weight": form.bits_per_weight(layer.k),
    }  # fmt: skip


def _sha256(region: Region) -> str:
    found, step = hashlib.sha256(), max(1, ROW_CHUNK_BYTES // region.row_bytes)
    for start in range(0, region.shape[0], step):
        found.update(region.rows(start, min(start + step, region.shape[0])).data)
    return found.hexdigest()
