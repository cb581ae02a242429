"""Prove a finished folder from its checkpoint alone: make it again where nothing is recalled, and compare every file."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.load import find_recipe, load_recipe
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.manifest import Manifest, read_manifest
from lowbit.pipeline.run.runner import run_recipe


def check_from_source(folder: Path, model: Path | None, console: Console) -> None:
    """Make the recipe of a result again, with a store of its own, and hold every file of every model against the result.

    What somebody put into a store, a graph with another epsilon for instance, agrees with itself, so `check_folder` accepts
    it; it does not agree with what the checkpoint gives. Takes as long as the first run, and as much disk, given back.

    Args:
        model: the checkpoint, if it is not where the recipe says.

    Raises:
        PipelineError: the checkpoint has other tensors, or a file is not what the recipe makes of it; names it.
    """
    manifest = read_manifest(folder)
    recipe = replace(_recipe_of(folder, manifest), name=manifest.recipe)
    with tempfile.TemporaryDirectory() as build:
        again = read_manifest(run_recipe(recipe, Path(build), model, console))
    if again.model.digest != manifest.model.digest:
        raise PipelineError(
            f"{folder}: was made of another checkpoint than {model or recipe.model.source}: {_first_tensor(manifest, again)}. "
            "Name the folder of the right one with --model."
        )
    ours, theirs = (
        {name: sha for name, sha in one.files.items() if Path(name).parts[0] in one.folders} for one in (manifest, again)
    )
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise PipelineError(
            f"{folder / wrong[0]}{more}: not what its recipe makes of the checkpoint{_first_layer(manifest, again)}. Other "
            "versions of libraries made it, or somebody put it into the store. Run the recipe again with another --store."
        )


def _recipe_of(folder: Path, manifest: Manifest) -> Recipe:
    """The recipe that was run: where its name leads, if that is still the same text, so that relative paths hold."""
    kept = folder / "recipe.yaml"
    text = kept.read_text("utf-8")
    try:
        named = load_recipe(find_recipe(manifest.recipe))
    except PipelineError:
        return load_recipe(kept)
    return named if named.text == text else load_recipe(kept)


def _first_tensor(manifest: Manifest, again: Manifest) -> str:
    ours, theirs = (
        {name: sha for shard in one.model.shards.values() for name, sha in shard.items()} for one in (manifest, again)
    )
    changed = next((name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)), None)
    return "its configuration is another" if changed is None else f"its tensor {changed} is another"


def _first_layer(manifest: Manifest, again: Manifest) -> str:
    """The first layer whose codes differ, if one does."""
    ours, theirs = manifest.weights, again.weights
    changed = (name for name in ours if name not in theirs or ours[name].codes_sha256 != theirs[name].codes_sha256)
    name = next(changed, None)
    return "" if name is None else f": the codes of {name} differ"
