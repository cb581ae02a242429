"""A recipe with `allocate_bits` -> the recipe of `quantize_matmul` entries that keeps its budget at the least loss."""

from __future__ import annotations

import math
from collections import Counter
from typing import TypeVar

from lowbit.passes.allocate_bits import AllocateBits
from lowbit.passes.quant.format import BlockFormat
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.mixed_precision.budget import BudgetEntry, Forms, describe_budget
from lowbit.pipeline.mixed_precision.device_times import device_times
from lowbit.pipeline.mixed_precision.measure import measure_sensitivities, recall_sensitivities
from lowbit.pipeline.mixed_precision.problem import Context, Problem, build_problem
from lowbit.pipeline.mixed_precision.sensitivity import Progress, Sensitivities
from lowbit.pipeline.mixed_precision.solver import Costs, Solution, solve
from lowbit.pipeline.recipe.edit import with_steps
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.report.units import megabytes

Number = TypeVar("Number", int, float)


def allocate(context: Context, entry: BudgetEntry, progress: Progress) -> tuple[Recipe, list[str]]:
    """The recipe with `allocate_bits`, that `entry`, replaced by what it chose, and remarks.

    Raises:
        PipelineError: the budget is too small, and what would be the smallest; or sensitivity cannot be measured so.
    """
    problem = build_problem(context, entry)
    solution, forms = solve_problem(context, problem, measure_sensitivities(context, problem, progress))
    return _resolved(context, entry, forms), _remarks(problem, solution, forms)


def recall_allocation(context: Context, entry: BudgetEntry) -> Recipe:
    """`allocate` by what was measured before; nothing is run.

    Raises:
        PipelineError: something was not measured yet.
    """
    problem = build_problem(context, entry)
    if (sensitivities := recall_sensitivities(context, problem)) is None:
        raise PipelineError(
            f"{context.recipe.file}: what each weight costs was not measured yet, so nobody can say which bits it gets. "
            f"`lowbit frontier {context.recipe.name}` measures it, and so does a run; then plan shows the choice."
        )
    _, forms = solve_problem(context, problem, sensitivities)
    return _resolved(context, entry, forms)


def solve_problem(
    context: Context, problem: Problem, sensitivities: Sensitivities, budget: int | None = None
) -> tuple[Solution, Forms]:
    """The choice for each group of layers, and for each layer.

    Args:
        budget: bytes, instead of the recipe's own.

    Raises:
        PipelineError: it cannot be met, and what is the least.
    """
    options = problem.options
    costs = Costs(
        _grouped(options, sensitivities), _grouped(options, problem.sizes), _grouped(options, _times(context, problem))
    )
    try:
        solution = solve(costs, problem.budget if budget is None else budget, options.max_relative_time)
    except PipelineError as error:
        smallest = problem.smallest
        least = megabytes(smallest + problem.fixed) if options.fit else f"{problem.bits(smallest):.3f}"
        raise PipelineError(
            f"{context.recipe.file}: {describe_budget(options)} cannot be met: {error}. The least is {least}: all weights at "
            f"{min(options.bits)} bits in blocks of {max(options.block_sizes)}, and {megabytes(problem.fixed)} that no "
            "choice changes (embedding, norms, tokenizer, graph, layers that other passes take)."
        ) from error
    return solution, {layer.name: solution.chosen[options.group_of(layer.name)] for layer in problem.layers}


def _resolved(context: Context, entry: BudgetEntry, forms: Forms) -> Recipe:
    return with_steps(context.recipe, entry.position, entry.build_entries(forms))


def _times(context: Context, problem: Problem) -> dict[tuple[str, BlockFormat], float]:
    """What each layer takes in each form, relative to all of them at 4 bits; empty where time does not count."""
    options = problem.options
    if options.target is None:
        return {}
    relative = device_times(options.target, context.recipe.folder).relative(options.bits)
    return {
        (layer.name, form): relative[form.bits] * math.prod(layer.weight.shape) / problem.count
        for layer in problem.layers
        for form in problem.forms
    }


def _grouped(options: AllocateBits, values: dict[tuple[str, BlockFormat], Number]) -> dict[tuple[str, BlockFormat], Number]:
    """Sums over the layers of each group."""
    totals: dict[tuple[str, BlockFormat], Number] = {}
    for (name, form), value in values.items():
        group = options.group_of(name), form
        totals[group] = totals.get(group, 0) + value
    return totals


def _remarks(problem: Problem, solution: Solution, forms: Forms) -> list[str]:
    kinds = Counter(f"{form.bits}/{form.block_size}" for form in forms.values())
    unit = "nats per token" if problem.options.sensitivity in ("kl", "fisher") else "relative squared error, summed"
    remarks = [
        f"{len(forms)} weights in {megabytes(solution.size)}, {problem.bits(solution.size):.3f} bits each",
        "bits/block: " + ", ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items())),
        f"expected loss {solution.expected_loss:.4g} ({unit}), at most {solution.gap:.1%} above the least possible",
    ]
    if solution.time is not None:
        remarks.append(f"expected to decode in {solution.time:.2f} of the time that 4 bits take on {problem.options.target}")
    return remarks
