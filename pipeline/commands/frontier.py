"""`lowbit frontier`: how good the model can be at every size, predicted everywhere and measured at some points."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from lowbit.passes.allocate_bits import AllocateBits
from lowbit.pipeline.checkpoint.resolve import resolve
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.mixed_precision.allocate import solve_problem
from lowbit.pipeline.mixed_precision.budget import BudgetEntry, Forms, budget_entry
from lowbit.pipeline.mixed_precision.measure import measure_sensitivities
from lowbit.pipeline.mixed_precision.problem import Context, Problem, build_problem
from lowbit.pipeline.mixed_precision.sensitivity import Sensitivities
from lowbit.pipeline.recipe.edit import put_steps, variant
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.charts import frontier_figure
from lowbit.pipeline.report.drawing import save
from lowbit.pipeline.report.manifest import read_manifest
from lowbit.pipeline.report.plain_text import plain_title
from lowbit.pipeline.report.units import megabytes
from lowbit.pipeline.run.context import Run
from lowbit.pipeline.run.prepare import export_steps
from lowbit.pipeline.run.runner import run_recipe
from lowbit.pipeline.run.step import execute
from lowbit.pipeline.run.workspace import locked
from lowbit.pipeline.store.store import Store, writing

BITS = tuple(round(float(bits), 2) for bits in np.arange(2.2, 4.51, 0.1))
"""Stored bits per weight that are asked for."""


@dataclass(frozen=True)
class Point:
    """One size.

    Attributes:
        name: `3.2` bits chosen, or `3/64` for all weights alike.
        bits_per_weight: stored, scales and zero points counted.
        bytes: of the folder where the budget is `fit`, of the weights where it is bits per weight.
        predicted: expected loss, in the unit of the recipe's sensitivity.
        kl_divergence: nats per token, where it was measured.
    """

    name: str
    bits_per_weight: float
    bytes: int
    predicted: float
    kl_divergence: float | None = None


def frontier(recipe: Recipe, build: Path, model: Path | None, measured: int, console: Console) -> Path:
    """Find the frontier of a recipe with `allocate_bits`; returns the folder with frontier.json, .svg and .png.

    Args:
        measured: at how many of its points the KL divergence is measured, beside those of uniform bits.

    Raises:
        PipelineError: the recipe has no budget.
    """
    if (entry := budget_entry(recipe)) is None:
        raise PipelineError(f"{recipe.file}: a frontier needs choices: put allocate_bits into passes.")
    folder = build / "frontier" / recipe.name
    with writing(build):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), writing(build):
        store = Store(build / ".store")
        run = Run.begin(recipe, resolve(recipe, model), store, console)
        for step in export_steps(recipe, run.checkpoint):
            execute(run, step)
        fresh = partial(load_graph, run.graph_file, run.checkpoint)
        context = Context(recipe, run.checkpoint, store, run.sources, fresh)
        problem = build_problem(context, entry)
        with run.steps.step("sensitivity", {}) as (_, report):
            sensitivities = measure_sensitivities(context, problem, lambda done: report(done, ""))
        points = {point.name: (point, forms) for point, forms in _points(context, problem, sensitivities)}
        uniform = {point.name: (point, forms) for point, forms in _uniform(problem, sensitivities)}
        everywhere = list(points)
        chosen = [everywhere[round(i)] for i in np.linspace(0, len(points) - 1, min(measured, len(points)))]
        for name in [*chosen, *(uniform if measured else ())]:
            kind = points if name in points else uniform
            point, forms = kind[name]
            kl = _measure(recipe, entry, forms, folder / f"{name.replace('/', '-')}.yaml", build, model)
            kind[name] = Point(**{**asdict(point), "kl_divergence": kl}), forms
            console.print(f"  {name} bits: KL {kl:.4f}", highlight=False)
        found = {"chosen": [point for point, _ in points.values()], "uniform": [point for point, _ in uniform.values()]}
        _write(folder, found, problem)
    console.print(_table(recipe, found))
    return folder


def _points(context: Context, problem: Problem, sensitivities: Sensitivities) -> list[tuple[Point, Forms]]:
    found = []
    for bits in BITS:
        budget = int(bits * problem.count / 8)
        if problem.smallest <= budget <= problem.largest:
            solution, forms = solve_problem(context, problem, sensitivities, budget)
            stored = problem.bits(solution.size)
            found.append((Point(f"{bits:g}", stored, solution.size + problem.fixed, solution.expected_loss), forms))
    if not found:
        raise PipelineError(
            f"{context.recipe.file}: the choices of bits and block_sizes make {problem.bits(problem.smallest):.2f} to "
            f"{problem.bits(problem.largest):.2f} bits per weight; a frontier goes from {BITS[0]} to {BITS[-1]}."
        )
    return found


def _uniform(problem: Problem, sensitivities: Sensitivities) -> list[tuple[Point, Forms]]:
    block_size = 64 if 64 in problem.options.block_sizes else max(problem.options.block_sizes)
    names = [layer.name for layer in problem.layers]
    found = []
    for form in problem.forms:
        if form.block_size == block_size and form.bits < 8:
            size = sum(problem.sizes[name, form] for name in names)
            loss = sum(sensitivities[name, form] for name in names)
            point = Point(f"{form.bits}/{block_size}", problem.bits(size), size + problem.fixed, loss)
            found.append((point, dict.fromkeys(names, form)))
    return found


def _measure(recipe: Recipe, entry: BudgetEntry, forms: Forms, file: Path, build: Path, model: Path | None) -> float:
    """The KL divergence of an ordinary run; what it makes is removed, what it measured and quantized is kept in the store."""

    def change(content: dict[str, Any]) -> None:
        put_steps(content, entry.position, entry.build_entries(forms))
        content.pop("convert", None)
        limits = ("max_kl_divergence", "max_perplexity_ratio")
        content["validate"] = {k: v for k, v in (content.get("validate") or {}).items() if k not in limits}

    made = run_recipe(variant(recipe, file, change), file.parent, model, Console(quiet=True), Store(build / ".store"))
    kl = read_manifest(made).quality.kl_divergence
    if kl is None:
        raise RuntimeError(f"{made}: a frontier's run has no KL divergence")
    shutil.rmtree(made)
    return kl


def _write(folder: Path, found: dict[str, list[Point]], problem: Problem) -> None:
    content = {kind: [asdict(point) for point in points] for kind, points in found.items()}
    (folder / "frontier.json").write_text(json.dumps(content, indent=1), "utf-8")
    save(
        frontier_figure(
            [(point.bytes / 1e6, point.predicted) for point in found["chosen"]] if _in_nats(problem.options) else [],
            [(point.bytes / 1e6, kl) for point in found["chosen"] if (kl := point.kl_divergence) is not None],
            [(point.name, point.bytes / 1e6, kl) for point in found["uniform"] if (kl := point.kl_divergence) is not None],
            "MB, the whole folder" if problem.options.fit else "MB, quantized weights",
        ),
        folder / "frontier",
    )


def _in_nats(options: AllocateBits) -> bool:
    return options.sensitivity in ("kl", "fisher")


def _table(recipe: Recipe, found: dict[str, list[Point]]) -> Table:
    title = plain_title(f"frontier of {recipe.name}")
    table = Table("", "bits per weight", "size", "predicted", "measured KL", title=title, title_justify="left")
    for kind, points in found.items():
        for point in points:
            measured = "" if point.kl_divergence is None else f"{point.kl_divergence:.4f}"
            row = (f"{point.bits_per_weight:.3f}", megabytes(point.bytes), f"{point.predicted:.4f}", measured)
            table.add_row(f"{kind} {point.name}", *row)
    return table
