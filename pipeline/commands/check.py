"""Prove a finished folder again: the manifest, every file, what the one says of the others, and every code of every engine."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lowbit.pipeline.commands.check_facts import AGAIN, check_facts, check_names, check_seal
from lowbit.pipeline.convert.registry import find_target
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.onnx_io.writer import DATA, MODEL
from lowbit.pipeline.report.manifest import Manifest, read_manifest
from lowbit.pipeline.store.digests import sha256


def check_folder(folder: Path) -> dict[str, Any]:
    """Check `build/<recipe>` against its manifest; returns how many files and weights were checked.

    Raises:
        PipelineError: a file is missing, changed, a link or none of the result, the manifest is not what was sealed or says
            what the files do not bear out, or a code differs between two models; names it.
    """
    manifest = read_manifest(folder)
    for hand_off in manifest.hand_offs.values():
        find_target(hand_off.target)  # one that is gone is named before anything that it made
    check_seal(folder, manifest)
    check_names(folder, manifest)
    for name, want in manifest.files.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
            raise PipelineError(f"{folder}: the manifest names '{name}', which is not a plain file of this folder.")
        if not path.is_file():
            raise PipelineError(f"{path}: missing. {AGAIN}")
        if sha256(path) != want:
            raise PipelineError(
                f"{path}: changed since the run ({_first_layer(folder, name, manifest)}). Run the recipe again."
            )
    check_facts(folder, manifest)
    return {"files": len(manifest.files), "weights": _prove(folder, manifest)}


def _prove(folder: Path, manifest: Manifest) -> int:
    """Prove every hand-off; returns how many weights were compared."""
    weights = 0
    for name, one in manifest.hand_offs.items():
        with tempfile.TemporaryDirectory() as scratch:
            proven = find_target(one.target).prove(folder / "onnx" / MODEL, folder / name, Path(scratch)).weights_checked
        if proven != one.weights_checked:
            raise PipelineError(
                f"{folder}: {proven:,} codes of {one.label} were compared, the manifest says {one.weights_checked:,}. {AGAIN}"
            )
        weights += proven
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
