"""Prove a finished folder from its checkpoint alone: make it again where nothing is recalled, and compare every file."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lowbit.pipeline.checkpoint.resolve import resolve
from lowbit.pipeline.errors import CheckpointError, PipelineError
from lowbit.pipeline.onnx_io.compare_graphs import graph_difference
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.recipe.load import find_recipe, load_recipe
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.gates import FIGURES
from lowbit.pipeline.report.manifest import Manifest, read_manifest
from lowbit.pipeline.run.prepare import COMPARED_SAMPLES
from lowbit.pipeline.run.runner import run_recipe
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests, model_digest, shards

GRAPH = f"onnx/{MODEL}"


def check_from_source(folder: Path, model: Path | None, console: Console) -> None:
    """Make the recipe of a result again, with a store of its own, and hold every file of every model against the result.

    What somebody put into a store, a graph with another epsilon for instance, agrees with itself, so `check_folder` accepts
    it; it does not agree with what the checkpoint gives. Takes about as long as the first run, and as much disk, given back.

    Args:
        model: the checkpoint, if it is not where it was.

    Raises:
        PipelineError: the checkpoint is gone or has other tensors, or a file is not what the recipe makes of it; names it.
    """
    manifest = read_manifest(folder)
    recipe = replace(_recipe_of(folder, manifest), name=manifest.recipe)
    if model is None and manifest.model.source != recipe.model.source:  # the run was given another place
        model = Path(manifest.model.source)
    with tempfile.TemporaryDirectory() as scratch:
        store = Store(Path(scratch) / ".store")
        _check_checkpoint(folder, manifest, recipe, model, SourceDigests(store))
        again = run_recipe(_without_gates(recipe), Path(scratch), model, console, store)
        _compare(folder, manifest, again)


def _recipe_of(folder: Path, manifest: Manifest) -> Recipe:
    """The recipe that was run: where its name leads, if that is still the same text, so that relative paths hold."""
    kept = folder / "recipe.yaml"
    text = kept.read_text("utf-8")
    try:
        named = load_recipe(find_recipe(manifest.recipe))
    except PipelineError:
        return load_recipe(kept)
    return named if named.text == text else load_recipe(kept)


def _without_gates(recipe: Recipe) -> Recipe:
    """The recipe with as much text as engines are compared on: figures of quality are not compared, so nobody needs them."""
    if recipe.validate is None:
        return recipe
    options = recipe.validate
    few = {"windows": min(options.windows, COMPARED_SAMPLES)}
    return replace(recipe, validate=options.model_copy(update=few | dict.fromkeys(FIGURES)))


def _check_checkpoint(folder: Path, manifest: Manifest, recipe: Recipe, model: Path | None, sources: SourceDigests) -> None:
    """Require the checkpoint that the manifest names, before anything is made of it."""
    try:
        checkpoint = resolve(recipe, model)
    except CheckpointError as error:
        error.add_note(f"{folder} was made of it: name the folder where it is now with --model.")
        raise
    if model_digest(checkpoint, sources) == manifest.model.digest:
        return
    ours, theirs = (
        {name: sha for shard in found.values() for name, sha in shard.items()}
        for found in (manifest.model.shards, shards(checkpoint, sources))
    )
    changed = next((name for name in sorted(ours.keys() | theirs.keys()) if ours.get(name) != theirs.get(name)), None)
    raise PipelineError(
        f"{folder}: was made of another checkpoint than {model or recipe.model.source}: "
        f"{'its configuration is another' if changed is None else f'its tensor {changed} is another'}. "
        "Name the folder of the right one with --model."
    )


def _compare(folder: Path, manifest: Manifest, again: Path) -> None:
    """Require that every file of every model is what was made again, to the byte."""
    made = read_manifest(again)
    ours, theirs = (
        {name: sha for name, sha in one.files.items() if Path(name).parts[0] in one.folders} for one in (manifest, made)
    )
    wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if not wrong:
        return
    # other codes and graphs show in files of every engine: what is wrong is said of where it began
    first = GRAPH if GRAPH in wrong else wrong[0]
    others = f", nor are {len(wrong) - 1} other files" if len(wrong) > 1 else ""
    differences = [_first_layer(manifest, made), graph_difference(folder / GRAPH, again / GRAPH)]
    said = "; ".join(filter(None, differences)) or "its SHA-256 is another"
    raise PipelineError(
        f"{folder / first}: not what its recipe makes of the checkpoint ({said}){others}. {_remedy(manifest, made)}"
    )


def _first_layer(manifest: Manifest, made: Manifest) -> str | None:
    """The first layer whose codes differ, if one does."""
    ours, theirs = manifest.weights, made.weights
    changed = (name for name in ours if name not in theirs or ours[name].codes_sha256 != theirs[name].codes_sha256)
    name = next(changed, None)
    return None if name is None else f"the codes of {name} are others"


def _remedy(manifest: Manifest, made: Manifest) -> str:
    """Why it may be so, and what to do."""
    other = [name for name in manifest.versions if name in made.versions and manifest.versions[name] != made.versions[name]]
    if other:
        return (
            f"It was made with {other[0]} {manifest.versions[other[0]]}: check it with that, here is {made.versions[other[0]]}."
        )
    return "Another version of lowbit made it, or somebody put it into the store. Run the recipe again with another --store."
