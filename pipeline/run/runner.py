"""The one loop: checkpoint -> ONNX graph -> passes -> files -> validation -> hand-off, every result recalled if known."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from lowbit.pipeline.checkpoint.chat_template import check_template
from lowbit.pipeline.checkpoint.resolve import resolve
from lowbit.pipeline.errors import ValidationFailed
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.export.support import describe
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.html import write_pages
from lowbit.pipeline.report.make_manifest import make_manifest, seal_manifest
from lowbit.pipeline.report.manifest import Manifest, Source
from lowbit.pipeline.report.progress import Steps
from lowbit.pipeline.report.summary import show_result
from lowbit.pipeline.run.context import Run
from lowbit.pipeline.run.convert import hand_off
from lowbit.pipeline.run.prepare import allocate_step, check_fit_step, export_step, rehearse_step
from lowbit.pipeline.run.quantize import (
    apply_step,
    calibrate_step,
    calibration_text_step,
    channel_scales_step,
    finetune_step,
    write_onnx_step,
)
from lowbit.pipeline.run.validate import validate_samples, validate_text
from lowbit.pipeline.run.workspace import locked, publish, work_folder
from lowbit.pipeline.store.store import Store, writing
from lowbit.pipeline.store.weight_keys import SourceDigests

COMPARED_SAMPLES = 4
"""Samples of the validation (windows of text) that both runtimes are compared on."""


def run_recipe(recipe: Recipe, build: Path, model: Path | None, console: Console, store: Store | None = None) -> Path:
    """Run a recipe and return its folder `build/<name>`, which changes only when everything is done.

    Args:
        model: take the checkpoint from this folder instead.
        store: where finished steps are kept, `build/.store` by default.

    Raises:
        PipelineError, PassError: what is wrong, in a sentence; results already made are kept.
    """
    target, asked = build / recipe.name, recipe
    with writing(build):
        target.mkdir(parents=True, exist_ok=True)
    with locked(target), work_folder(target) as work:
        kept = store or Store(build / ".store")
        kept.sweep()
        run = Run(recipe, resolve(recipe, model), kept, Steps(console), SourceDigests(kept))
        console.print(f"{recipe.name}: {describe(run.checkpoint)}")
        check_template(run.checkpoint)
        with writing(build):
            run.graph_file = graph_file = export_step(run)
            recipe = allocate_step(run)
            samples = rehearse_step(run, graph_file)
            graph = load_graph(graph_file, run.checkpoint)
            for step in recipe.passes:
                apply_step(run, graph, step)
            if recipe.calibrate is not None:
                text = calibration_text_step(run)
                channel_scales_step(run, graph, text)
                calibrate_step(run, graph, text)
                finetune_step(run, graph, text)
            write_onnx_step(run, graph, work / "onnx")
            if recipe.validate is not None:
                validating = validate_text if run.decoder else validate_samples
                validating(run, graph_file, work / "onnx", samples)
            for number, options in enumerate(recipe.convert, 1):
                own = graph if number == len(recipe.convert) else graph.copy()
                hand_off(run, own, options, work, samples[:COMPARED_SAMPLES])
            check_fit_step(asked, work)
            (work / "recipe.yaml").write_text(asked.text, "utf-8")
            if asked is not recipe:
                (work / "resolved.yaml").write_text(recipe.text, "utf-8")
            manifest = make_manifest(
                work, recipe, run.checkpoint, steps=run.steps.records, quality=run.quality, hand_offs=run.hand_offs,
                model=Source(
                    source=run.checkpoint.source, revision=run.checkpoint.revision, digest=run.model_digest(),
                    shards=run.shards(),
                ),
                weights=run.entries, source_of=run.sources.of,
            )  # fmt: skip
            write_pages(work, manifest, run.checkpoint)
            manifest = seal_manifest(work, manifest)
            publish(work, target)
    show_result(console, manifest, target)
    _check_gates(recipe, manifest)
    return target


def _check_gates(recipe: Recipe, manifest: Manifest) -> None:
    if manifest.missed:
        missed = "; ".join(f"{gate.name}: {gate.measured}, allowed {gate.allowed}" for gate in manifest.missed)
        raise ValidationFailed(f"{recipe.file}: gate missed: {missed}. All results are kept in the build folder.")
