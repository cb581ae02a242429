"""Runs in tests: what a run exports in a process of its own is exported here before, in one that has imported torch already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from lowbit.pipeline.checkpoint.resolve import resolve
from lowbit.pipeline.export.exporter import export_graph
from lowbit.pipeline.export.support import check_config, check_layers
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.run.context import Run
from lowbit.pipeline.run.prepare import export_steps
from lowbit.pipeline.run.runner import run_recipe
from lowbit.pipeline.store.store import Store

QUIET = Console(quiet=True)


def know_export(recipe: Recipe, store: Store, model: Path | None = None) -> Path:
    """The float graph of a recipe's model, in `store` as a run would have left it; an ONNX file is one already.

    Raises:
        PipelineError: as the run would.
    """
    checkpoint = resolve(recipe, model)
    run = Run.begin(recipe, checkpoint, store, QUIET)

    def export(folder: Path) -> dict[str, Any]:
        check_config(checkpoint, recipe.export)
        check_layers(checkpoint)
        export_graph(checkpoint, recipe.export, folder / MODEL)
        return {}

    for step in export_steps(recipe, checkpoint):
        key = step.key(run)
        return (store.get(key) or store.put(key, export)).file(MODEL)
    return run.graph_file


def run_in_process(
    recipe: Recipe, build: Path, store: Store | None = None, model: Path | None = None, console: Console = QUIET
) -> Path:
    """`run_recipe`, quietly by default, exporting nowhere else."""
    store = store or Store(build / ".store")
    know_export(recipe, store, model)
    return run_recipe(recipe, build, model, console, store)
