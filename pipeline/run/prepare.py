"""The steps before a graph is quantized: export, budget, and a rehearsal that refuses what it can without reading a weight."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from lowbit.passes.graph.quantized_ops import quantized_weight
from lowbit.pipeline.calibrate.channel_scales import set_to_one
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.onnx_model import OnnxModel
from lowbit.pipeline.convert.registry import find_target, make_target
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.estimate.sizes import Plan, plan_of
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.export.exporter import export_graph
from lowbit.pipeline.export.limited import export_within_limits
from lowbit.pipeline.export.support import check_config, check_layers, describe
from lowbit.pipeline.mixed_precision.allocate import allocate
from lowbit.pipeline.mixed_precision.budget import BudgetEntry, budget_entry
from lowbit.pipeline.mixed_precision.problem import Context
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.recipe.targets import target_names
from lowbit.pipeline.report.units import megabytes
from lowbit.pipeline.run.context import Run
from lowbit.pipeline.run.step import Step, Task
from lowbit.pipeline.runtime.isolate import isolated
from lowbit.pipeline.validate.dataset import decoder_samples, samples_digest, samples_for, token_windows

EXPORT_LIBRARIES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx")
COMPARED_SAMPLES = 4
"""Samples of the validation (windows of text) that engines are compared on."""


def opening_steps(recipe: Recipe, checkpoint: Checkpoint) -> list[Step]:
    """The float graph, and the bits that a budget allows: what the other steps are listed from."""
    steps = export_steps(recipe, checkpoint)
    if (entry := budget_entry(recipe)) is not None:
        options = entry.options.model_dump(mode="json")
        steps.append(Step("allocate_bits", partial(_allocate, entry=entry), options, ("config",)))
    return steps


def export_steps(recipe: Recipe, checkpoint: Checkpoint) -> list[Step]:
    """The float graph of a checkpoint; an ONNX file is one already."""
    if isinstance(checkpoint, OnnxModel):
        return []
    options = recipe.export.model_dump(mode="json")
    return [Step("export", _export, options, ("config",), code=(export_graph,), packages=EXPORT_LIBRARIES)]


def rehearsal() -> Step:
    """Everything that can be refused without reading a weight; makes `samples`, and `compared`, the first of them."""
    return Step("rehearse", _rehearse, inputs=("config",))


def _export(run: Run, task: Task) -> None:
    def write(folder: Path) -> dict[str, Any]:
        check_config(run.checkpoint, run.recipe.export)
        check_layers(run.checkpoint)
        isolated(export_within_limits, run.checkpoint, run.recipe.export, folder / MODEL)
        return {}

    run.graph_file = task.recall(write).file(MODEL)


def _allocate(run: Run, task: Task, entry: BudgetEntry) -> None:
    """Replace a budget by passes with bits for every weight."""
    fresh = partial(load_graph, run.graph_file, run.checkpoint)
    context = Context(run.recipe, run.checkpoint, run.store, run.sources, fresh)
    run.recipe, notes = allocate(context, entry, task.progress)
    task.record.notes += notes
    task.remember([[entry.name, entry.options.model_dump(mode="json")] for entry in run.recipe.passes])


def _rehearse(run: Run, task: Task) -> None:
    recipe = run.recipe
    graph = load_graph(run.graph_file, run.checkpoint)
    for entry in recipe.passes:
        entry.apply(graph)
    set_to_one(graph)
    if not any(quantized_weight(node) for node in graph.nodes):
        raise PipelineError(f"{recipe.file}: this recipe quantizes nothing; add quantize_matmul to passes.")
    _check_disk(plan_of(recipe, run.checkpoint, graph, run.store), run.store.root.parent)
    _check_decoder(run)
    if recipe.validate is not None or recipe.convert:
        if run.decoder:
            run.samples = decoder_samples(token_windows(recipe, run.checkpoint))
        else:
            run.samples = samples_for(recipe, run.checkpoint, graph)
    for options in recipe.convert:
        make_target(options, run.checkpoint).rehearse(graph.copy())
    run.keys |= {"samples": samples_digest(run.samples), "compared": samples_digest(run.samples[:COMPARED_SAMPLES])}
    run.graph = load_graph(run.graph_file, run.checkpoint)


def _check_decoder(run: Run) -> None:
    """What only makes sense for models that generate text is refused for others, and the other way round."""
    options = run.recipe.validate or Validate()
    for name in ("inputs", "max_relative_error") if run.decoder else ("max_kl_divergence", "max_perplexity_ratio"):
        if getattr(options, name) is not None:
            kind = "generates text" if run.decoder else "does not generate text"
            raise PipelineError(f"{run.recipe.file}: validate: {name} means nothing here, the model {kind}. Leave it out.")
    what = describe(run.checkpoint)
    for entry in run.recipe.convert:
        if find_target(entry.target).decoders != run.decoder:
            fitting = " or ".join(name for name in target_names() if find_target(name).decoders == run.decoder)
            kind = "generate no text" if run.decoder else "generate text"
            raise PipelineError(
                f"{run.recipe.file}: target {entry.target} is for models that {kind}; for this one ({what}) set convert: "
                f"{{target: {fitting}}}."
            )
    if run.recipe.calibrate is not None and not run.decoder:
        raise PipelineError(f"{run.recipe.file}: calibrate looks at decoders only, and this is none ({what}). Leave it out.")


def _check_disk(plan: Plan, build: Path) -> None:
    free = shutil.disk_usage(build).free
    if plan.disk_bytes > free:
        raise PipelineError(
            f"{build}: this run needs {megabytes(plan.disk_bytes)} of disk, {megabytes(free)} are free. Free some, or "
            "build elsewhere with --build."
        )
