"""The one loop: checkpoint -> ONNX graph -> passes -> files -> validation -> hand-off, every result recalled if known."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lowbit.pipeline.checkpoint.chat_template import check_template
from lowbit.pipeline.checkpoint.resolve import resolve
from lowbit.pipeline.checkpoint.tokenizer import check_tokenizer
from lowbit.pipeline.convert.registry import find_target
from lowbit.pipeline.errors import ValidationFailed
from lowbit.pipeline.export.support import describe
from lowbit.pipeline.mixed_precision.budget import check_budget
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.html import write_pages
from lowbit.pipeline.report.log import logged
from lowbit.pipeline.report.make_manifest import make_manifest, seal_manifest
from lowbit.pipeline.report.manifest import Manifest
from lowbit.pipeline.report.plain_text import plain
from lowbit.pipeline.report.records import Source
from lowbit.pipeline.report.summary import show_result
from lowbit.pipeline.run.context import Run
from lowbit.pipeline.run.prepare import opening_steps
from lowbit.pipeline.run.step import execute
from lowbit.pipeline.run.steps import steps_after_opening
from lowbit.pipeline.run.workspace import RESOLVED, locked, publish, work_folder
from lowbit.pipeline.store.durable import make_folder
from lowbit.pipeline.store.store import Store, writing


def run_recipe(recipe: Recipe, build: Path, model: Path | None, console: Console, store: Store | None = None) -> Path:
    """Run a recipe and return its folder `build/<name>`, which changes only when everything is done.

    Args:
        model: take the checkpoint from this folder instead.
        store: where finished steps are kept, `build/.store` by default.

    Raises:
        PipelineError, PassError: what is wrong, in a sentence; results already made are kept.
    """
    target, store = build / recipe.name, store or Store(build / ".store")
    with writing(build):
        make_folder(target)
    with writing(build), locked(target), logged(target), work_folder(target) as work:
        store.sweep()
        run = Run.begin(recipe, resolve(recipe, model), store, console, work)
        console.print(plain(f"{recipe.name}: {describe(run.checkpoint)}"))
        check_template(run.checkpoint)
        check_tokenizer(run.checkpoint)
        for step in opening_steps(recipe, run.checkpoint):
            execute(run, step)
        for step in steps_after_opening(run.recipe, run.checkpoint):
            execute(run, step)
        manifest = _finish(run, recipe)
        publish(work, target)
    show_result(console, manifest, target)
    _check_gates(recipe, manifest)
    return target


def _finish(run: Run, asked: Recipe) -> Manifest:
    """What stands beside the models: recipes, report, model card, and the manifest over all of it."""
    check_budget(asked, run.work)
    (run.work / "recipe.yaml").write_text(asked.text, "utf-8")
    if asked is not run.recipe:
        (run.work / RESOLVED).write_text(run.recipe.text, "utf-8")
    manifest = make_manifest(
        run.work, run.recipe, run.checkpoint, steps=run.steps.records, quality=run.quality, hand_offs=run.hand_offs,
        model=Source(
            source=run.checkpoint.source, revision=run.checkpoint.revision, digest=run.key("weights"), shards=run.shards(),
        ),
        weights=run.entries, source_of=run.sources.of,
        engines=[package for options in run.recipe.convert for package in find_target(options.target).packages],
    )  # fmt: skip
    write_pages(run.work, manifest, run.checkpoint)
    return seal_manifest(run.work, manifest)


def _check_gates(recipe: Recipe, manifest: Manifest) -> None:
    if manifest.missed:
        missed = "; ".join(f"{gate.name}: {gate.measured}, allowed {gate.allowed}" for gate in manifest.missed)
        raise ValidationFailed(f"{recipe.file}: gate missed: {missed}. All results are kept in the build folder.")
