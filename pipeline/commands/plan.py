"""What a run would do: the recipe's own passes on the graph, or on a sketch of it, with no weight read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from rich.table import Table

from lowbit.pipeline.checkpoint.onnx_model import OnnxModel
from lowbit.pipeline.checkpoint.resolve import resolve
from lowbit.pipeline.estimate.sizes import Plan, Planned, plan_of
from lowbit.pipeline.estimate.sketch import sketch
from lowbit.pipeline.export.support import check_config
from lowbit.pipeline.mixed_precision.allocate import recall_allocation
from lowbit.pipeline.mixed_precision.budget import budget_entry
from lowbit.pipeline.mixed_precision.problem import Context
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.bits_map import bits_map
from lowbit.pipeline.report.plain_text import plain, plain_title
from lowbit.pipeline.report.units import megabytes
from lowbit.pipeline.run.steps import all_steps
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests


def make_plan(recipe: Recipe, build: Path, model: Path | None) -> Plan:
    """Apply the recipe's passes to a sketch of the checkpoint's graph.

    Raises:
        PipelineError, PassError: what a run would refuse as well, as far as headers tell.
    """
    checkpoint = resolve(recipe, model, download=False)
    if isinstance(checkpoint, OnnxModel):
        graph = checkpoint.graph()
    else:
        check_config(checkpoint, recipe.export)
        graph = sketch(checkpoint)
    store, asked = Store(build / ".store"), recipe
    if (entry := budget_entry(recipe)) is not None:
        context = Context(recipe, checkpoint, store, SourceDigests(store), graph.copy, sketched=True)
        recipe = recall_allocation(context, entry)
    for step in recipe.passes:
        if not step.options.keeps_shapes:
            step.apply(graph)
    steps = tuple(step.name for step in all_steps(asked, recipe, checkpoint))
    return replace(plan_of(recipe, checkpoint, graph, store), steps=steps)


def plan_tables(plan: Plan) -> list[Table]:
    """The plan for people: one row for each kind of layer, then totals."""
    recipe = plan.recipe
    groups: dict[tuple[str, ...], list[Planned]] = {}
    for one in plan.weights:
        form = one.weight.form
        kind = one.weight.name.rpartition(".")[2]
        shape = " x ".join(map(str, one.weight.source.shape))
        zeros = ", symmetric" if form.symmetric else ", float zero points" if form.free else ""
        what = f"{form.bits} bits, block {form.block_size}{zeros}"
        groups.setdefault((kind, shape, what, one.weight.made_by), []).append(one)
    title = plain_title(f"plan of {recipe.name}")
    layers = Table("layers", "", "shape", "becomes", "method", "ONNX", "known", title=title, title_justify="left")
    for (kind, shape, what, method), members in groups.items():
        size = megabytes(sum(one.onnx_bytes for one in members))
        known = f"{sum(one.cached for one in members)} of {len(members)}"
        if members[0].weight.method.calibrated or members[0].weight.training is not None:
            known = "at run time"  # the key holds what all earlier layers became
        layers.add_row(*map(plain, (kind, f"{len(members)} x", shape, what, method, size, known)))
    totals = Table(show_header=False)
    totals.add_row("reads", megabytes(plan.source_bytes))
    totals.add_row("bits per weight", f"{plan.bits_per_weight:.3f}")
    totals.add_row("float weights kept", megabytes(plan.float_bytes))
    totals.add_row("ONNX model", megabytes(plan.onnx_bytes))
    for target, count in plan.hand_off_bytes.items():
        totals.add_row(plain(f"{target} folder"), megabytes(count))
    totals.add_row("disk needed", megabytes(plan.disk_bytes))
    totals.add_row("memory needed", f"about {megabytes(plan.memory_bytes)}")
    totals.add_row("time expected", f"about {_duration(plan.seconds)} on 2 cores and a disk of 500 MB/s")
    totals.add_row("steps", plain(", ".join(plan.steps)))
    bits = bits_map({one.weight.name: (one.weight.form.bits, one.weight.form.block_size) for one in plan.weights})
    return [layers, *([] if bits is None else [bits]), totals]


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.0f} h"
