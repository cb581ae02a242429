"""The steps before a graph is quantized: export, budget, and everything that can be refused without reading a weight."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from lowbit.passes.graph.quantized_ops import quantized_weight
from lowbit.pipeline.calibrate.channel_scales import set_to_one
from lowbit.pipeline.checkpoint.onnx_model import OnnxModel
from lowbit.pipeline.convert.registry import find_target, make_target
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.estimate.sizes import Plan, plan_of
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.export.exporter import export_graph
from lowbit.pipeline.export.support import check_config, check_layers, describe
from lowbit.pipeline.mixed_precision.allocate import allocate
from lowbit.pipeline.mixed_precision.problem import Context, budget_entry
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.recipe.targets import target_names
from lowbit.pipeline.report.units import megabytes
from lowbit.pipeline.run.context import Run
from lowbit.pipeline.runtime.isolate import isolated
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.validate.dataset import decoder_samples, samples_for, token_windows

EXPORT_LIBRARIES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx")


def export_step(run: Run) -> Path:
    """The float graph of a run's checkpoint, exported now if it is not known."""
    if isinstance(run.checkpoint, OnnxModel):
        return run.checkpoint.file
    options = run.recipe.export
    with run.steps.step("export", options.model_dump(mode="json")) as (record, _):
        record.key = digest(
            "export", run.checkpoint.config, record.options, source_digest(export_graph), versions(EXPORT_LIBRARIES),
        )  # fmt: skip
        entry = run.store.get(record.key)
        record.cached = entry is not None
        if entry is None:
            check_config(run.checkpoint, options)
            check_layers(run.checkpoint)

            def write(folder: Path) -> dict[str, Any]:
                isolated(export_graph, run.checkpoint, options, folder / MODEL)
                return {}

            entry = run.store.put(record.key, write)
    return entry.file(MODEL)


def allocate_step(run: Run) -> Recipe:
    """The recipe to run: one with a budget becomes one with bits for every weight."""
    if (entry := budget_entry(run.recipe)) is None:
        return run.recipe
    with run.steps.step("allocate_bits", entry.options.model_dump(mode="json")) as (record, report):
        fresh = partial(load_graph, run.graph_file, run.checkpoint)
        context = Context(run.recipe, run.checkpoint, run.store, run.sources, fresh)
        run.recipe, notes = allocate(context, entry, lambda done: report(done, ""))
        record.notes += notes
    return run.recipe


def check_fit_step(asked: Recipe, work: Path) -> None:
    """A budget is kept, or the result is not published."""
    if (entry := budget_entry(asked)) is None or (fit := entry.options.fit_bytes) is None:
        return
    folder = work / (asked.convert[0].folder if asked.convert else "onnx")
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size > fit:
        raise RuntimeError(f"{folder.name} has {size} bytes, fit: {entry.options.fit} allows {fit}")


def rehearse_step(run: Run, graph_file: Path) -> list[Feeds]:
    """Everything that can be refused without reading a weight is refused here; returns what models are compared on."""
    with run.steps.step("rehearse", {}):
        graph = load_graph(graph_file, run.checkpoint)
        for step in run.recipe.passes:
            step.apply(graph)
        set_to_one(graph)
        if not any(quantized_weight(node) for node in graph.nodes):
            raise PipelineError(f"{run.recipe.file}: this recipe quantizes nothing; add quantize_matmul to passes.")
        _check_disk(plan_of(run.recipe, run.checkpoint, graph, run.store), run.store.root.parent)
        _check_decoder(run)
        samples: list[Feeds] = []
        if run.recipe.validate is not None or run.recipe.convert:
            if run.decoder:
                samples = decoder_samples(token_windows(run.recipe, run.checkpoint))
            else:
                samples = samples_for(run.recipe, run.checkpoint, graph)
        for options in run.recipe.convert:
            make_target(options, run.checkpoint).rehearse(graph.copy())
    return samples


def _check_decoder(run: Run) -> None:
    """What only makes sense for models that generate text is refused for others, and the other way round."""
    options = run.recipe.validate or Validate()
    for name in ("inputs", "max_relative_error") if run.decoder else ("max_kl_divergence", "max_perplexity_ratio"):
        if getattr(options, name) is not None:
            kind = "generates text" if run.decoder else "does not generate text"
            raise PipelineError(f"{run.recipe.file}: validate: {name} means nothing here, the model {kind}. Leave it out.")
    what = describe(run.checkpoint)
    for one in run.recipe.convert:
        if find_target(one.target).decoders != run.decoder:
            fitting = " or ".join(name for name in target_names() if find_target(name).decoders == run.decoder)
            kind = "generate no text" if run.decoder else "generate text"
            raise PipelineError(
                f"{run.recipe.file}: target {one.target} is for models that {kind}; for this one ({what}) set convert: "
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
