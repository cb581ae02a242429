"""Prove a finished folder again: every file's hash, then every code in both files."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lowbit.pipeline.convert.registry import find_target
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.onnx_io.writer import DATA, MODEL
from lowbit.pipeline.report.manifest import Manifest, read_manifest
from lowbit.pipeline.store.digests import sha256


def check_folder(folder: Path) -> dict[str, Any]:
    """Check `build/<recipe>` against its manifest; returns how many files and weights were checked.

    Raises:
        PipelineError: a file is missing or changed, or a code differs between the two models; names it.
    """
    manifest = read_manifest(folder)
    for name, want in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
            raise PipelineError(f"{folder}: the manifest names '{name}', which is not a plain file of this folder.")
        if not path.is_file():
            raise PipelineError(f"{path}: missing. Run the recipe again; what is known already is recalled.")
        if sha256(path) != want:
            raise PipelineError(
                f"{path}: changed since the run ({_first_layer(folder, name, manifest)}). Run the recipe again."
            )
    return {"files": len(manifest.files), "weights": _prove(folder, manifest)}


def _prove(folder: Path, manifest: Manifest) -> int:
    """Prove every hand-off; returns how many weights were compared."""
    weights = 0
    for name, one in manifest.hand_offs.items():
        with tempfile.TemporaryDirectory() as scratch:
            weights += find_target(one.target).prove(folder / "onnx" / MODEL, folder / name, Path(scratch)).weights_checked
    return weights


def _first_layer(folder: Path, name: str, manifest: Manifest) -> str:
    """What the codes say about a changed weight file, where they say something."""
    place = Path(name)
    hand_off = manifest.hand_offs.get(place.parts[0])
    if place.name not in (find_target(hand_off.target).weight_files if hand_off else (DATA,)):
        return "its SHA-256 is another"
    try:
        _prove(folder, manifest)
    except PipelineError as error:
        return str(error)
    return "its SHA-256 is another, though all codes agree"
