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
from lowbit.passes.quant.format import BlockFormat
from lowbit.pipeline.checkpoint.resolve import resolve
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.mixed_precision.budget import Context, Question, answer, ask, budget_place, measure
from lowbit.pipeline.mixed_precision.sensitivity import Damages
from lowbit.pipeline.mixed_precision.solver import resolved_steps
from lowbit.pipeline.recipe.edit import put_steps, variant
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.figures import frontier_figure, save
from lowbit.pipeline.report.manifest import read_manifest
from lowbit.pipeline.report.progress import Steps
from lowbit.pipeline.report.units import megabytes
from lowbit.pipeline.run.context import Run
from lowbit.pipeline.run.prepare import export_step
from lowbit.pipeline.run.runner import run_recipe
from lowbit.pipeline.store.store import Store, writing
from lowbit.pipeline.store.weight_keys import SourceDigests

BITS = tuple(round(float(bits), 2) for bits in np.arange(2.2, 4.51, 0.1))
"""Stored bits per weight that are asked for."""
Forms = dict[str, BlockFormat]


@dataclass(frozen=True)
class Point:
    """One size.

    Attributes:
        name: `3.2` bits chosen, or `3/64` for all weights alike.
        bits_per_weight: stored, scales and zero points counted.
        bytes: of the folder where the budget is `fit`, of the weights where it is bits per weight.
        predicted: expected damage, in the unit of the recipe's sensitivity.
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
    if (place := budget_place(recipe)) is None:
        raise PipelineError(f"{recipe.file}: a frontier needs choices: put allocate_bits into passes.")
    folder = build / "frontier" / recipe.name
    with writing(build):
        folder.mkdir(parents=True, exist_ok=True)
        store = Store(build / ".store")
        run = Run(recipe, resolve(recipe, model), store, Steps(console), SourceDigests(store))
        fresh = partial(load_graph, export_step(run), run.checkpoint)
        context = Context(recipe, run.checkpoint, store, run.sources, fresh)
        asked = ask(context, place)
        with run.steps.step("sensitivity", {}) as (_, report):
            damages = measure(context, place, asked, lambda done: report(done, ""))
        points = {point.name: (point, forms) for point, forms in _points(context, asked, damages)}
        uniform = {point.name: (point, forms) for point, forms in _uniform(asked, damages)}
        everywhere = list(points)
        chosen = [everywhere[round(i)] for i in np.linspace(0, len(points) - 1, min(measured, len(points)))]
        for name in [*chosen, *(uniform if measured else ())]:
            kind = points if name in points else uniform
            point, forms = kind[name]
            kl = _measure(recipe, place, forms, folder / f"{name.replace('/', '-')}.yaml", build, model)
            kind[name] = Point(**{**asdict(point), "kl_divergence": kl}), forms
            console.print(f"  {name} bits: KL {kl:.4f}", highlight=False)
        found = {"chosen": [point for point, _ in points.values()], "uniform": [point for point, _ in uniform.values()]}
        _write(folder, found, asked)
    console.print(_table(recipe, found, asked))
    return folder


def _points(context: Context, asked: Question, damages: Damages) -> list[tuple[Point, Forms]]:
    least = sum(min(asked.sizes[one.name, form] for form in asked.forms) for one in asked.layers)
    most = sum(max(asked.sizes[one.name, form] for form in asked.forms) for one in asked.layers)
    found = []
    for bits in BITS:
        budget = int(bits * asked.count / 8)
        if least <= budget <= most:
            solved, forms = answer(context, asked, damages, budget)
            stored = 8 * solved.size / asked.count
            found.append((Point(f"{bits:g}", stored, solved.size + asked.fixed, solved.damage), forms))
    if not found:
        raise PipelineError(
            f"{context.recipe.file}: the choices of bits and block_sizes make {8 * least / asked.count:.2f} to "
            f"{8 * most / asked.count:.2f} bits per weight; a frontier goes from {BITS[0]} to {BITS[-1]}."
        )
    return found


def _uniform(asked: Question, damages: Damages) -> list[tuple[Point, Forms]]:
    size = 64 if 64 in asked.options.block_sizes else max(asked.options.block_sizes)
    found = []
    for form in asked.forms:
        if form.block_size == size and form.bits < 8:
            size_of_all = sum(asked.sizes[one.name, form] for one in asked.layers)
            damage = sum(damages[one.name, form] for one in asked.layers)
            point = Point(f"{form.bits}/{size}", 8 * size_of_all / asked.count, size_of_all + asked.fixed, damage)
            found.append((point, dict.fromkeys((one.name for one in asked.layers), form)))
    return found


def _measure(recipe: Recipe, place: int, forms: Forms, file: Path, build: Path, model: Path | None) -> float:
    """The KL divergence of an ordinary run; what it makes is removed, what it measured and quantized is kept in the store."""

    def change(content: dict[str, Any]) -> None:
        put_steps(content, place, resolved_steps(recipe.passes[place], forms))
        content.pop("convert", None)
        limits = ("max_kl_divergence", "max_perplexity_ratio")
        content["validate"] = {k: v for k, v in (content.get("validate") or {}).items() if k not in limits}

    made = run_recipe(variant(recipe, file, change), file.parent, model, Console(quiet=True), Store(build / ".store"))
    kl = read_manifest(made).quality.kl_divergence
    if kl is None:
        raise RuntimeError(f"{made}: a frontier's run has no KL divergence")
    shutil.rmtree(made)
    return kl


def _write(folder: Path, found: dict[str, list[Point]], asked: Question) -> None:
    content = {kind: [asdict(point) for point in points] for kind, points in found.items()}
    (folder / "frontier.json").write_text(json.dumps(content, indent=1), "utf-8")
    save(
        frontier_figure(
            [(point.bytes / 1e6, point.predicted) for point in found["chosen"]] if _in_nats(asked.options) else [],
            [(point.bytes / 1e6, kl) for point in found["chosen"] if (kl := point.kl_divergence) is not None],
            [(point.name, point.bytes / 1e6, kl) for point in found["uniform"] if (kl := point.kl_divergence) is not None],
            "MB, the whole folder" if asked.options.fit else "MB, quantized weights",
        ),
        folder / "frontier",
    )


def _in_nats(options: AllocateBits) -> bool:
    return options.sensitivity in ("kl", "fisher")


def _table(recipe: Recipe, found: dict[str, list[Point]], asked: Question) -> Table:
    table = Table(
        "", "bits per weight", "size", "predicted", "measured KL", title=f"frontier of {recipe.name}", title_justify="left"
    )
    for kind, points in found.items():
        for point in points:
            measured = "" if point.kl_divergence is None else f"{point.kl_divergence:.4f}"
            row = (f"{point.bits_per_weight:.3f}", megabytes(point.bytes), f"{point.predicted:.4f}", measured)
            table.add_row(f"{kind} {point.name}", *row)
    return table
