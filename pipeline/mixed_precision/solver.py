"""`allocate_bits` in a recipe -> the `quantize_matmul` entries that it stands for: an integer programme, solved exactly."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lowbit.passes.allocate_bits import AllocateBits
from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.recipe import Step


@dataclass(frozen=True)
class Allocation:
    """What was chosen for each group of weights.

    Attributes:
        chosen: by group.
        damage: expected, the sum over groups.
        size: bytes of all groups.
        time: of all groups, relative to 4 bits; None where it does not count.
        gap: how far the damage may be from the least possible one, as a share of it.
    """

    chosen: dict[str, BlockFormat]
    damage: float
    size: int
    gap: float
    time: float | None = None


@dataclass(frozen=True)
class Costs:
    """What each form of each group costs: expected damage, bytes, and time (empty where it does not count)."""

    damages: dict[tuple[str, BlockFormat], float]
    sizes: dict[tuple[str, BlockFormat], int]
    times: dict[tuple[str, BlockFormat], float] = field(default_factory=dict)


def allocate(costs: Costs, budget: int, longest: float | None = None) -> Allocation:
    """One form for each group so that the sizes sum to at most `budget` bytes, times to `longest`, damages to the least.

    The multiple-choice knapsack as an integer programme, by HiGHS (Huangfu and Hall, doi:10.1007/s12532-017-0130-5).

    Raises:
        PipelineError: even the smallest forms are larger, or the fastest slower.
    """
    damages, sizes, times = costs.damages, costs.sizes, costs.times
    groups, forms = list(dict.fromkeys(g for g, _ in damages)), list(dict.fromkeys(f for _, f in damages))
    smallest = sum(min(sizes[group, form] for form in forms) for group in groups)
    if smallest > budget:
        raise PipelineError(f"the smallest choices take {smallest:,} bytes, {budget:,} are left for them")
    if longest is not None and (least := sum(min(times[g, f] for f in forms) for g in groups)) > longest:
        raise PipelineError(f"the fastest choices take {least:.3f} of the time of 4 bits, {longest:g} are allowed")
    places = [(group, form) for group in groups for form in forms]
    cost = np.array([damages[place] for place in places])
    size = np.array([float(sizes[place]) for place in places])
    rows = np.repeat(np.arange(len(groups)), len(forms))
    one_each = csr_array((np.ones(len(places)), (rows, np.arange(len(places)))))
    scale = max(float(cost.max()), np.finfo(np.float64).tiny)
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / budget, -np.inf, 1.0)]
    if longest is not None:
        limits.append(LinearConstraint(np.array([[times[place] / longest for place in places]]), -np.inf, 1.0))
    solved = milp(
        cost / scale, integrality=np.ones(len(places)), bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0, "time_limit": 60.0},
        constraints=limits,
    )  # fmt: skip
    if solved.x is None:
        both = "" if longest is None else f" that are as fast as max_relative_time: {longest:g} asks for"
        raise PipelineError(f"no choices{both} fit into {budget:,} bytes ({solved.message})")
    picked = solved.x.reshape(len(groups), len(forms)).argmax(1)
    chosen = {group: forms[i] for group, i in zip(groups, picked, strict=True)}
    total = sum(sizes[group, form] for group, form in chosen.items())
    if total > budget:  # the solver's tolerance is a millionth of the budget
        return allocate(costs, budget - (total - budget), longest)
    time = None if longest is None else sum(times[place] for place in chosen.items())
    return Allocation(chosen, sum(damages[place] for place in chosen.items()), total, float(solved.mip_gap or 0.0), time)


def resolved_steps(step: Step, chosen: dict[str, BlockFormat]) -> list[Step]:
    """The `quantize_matmul` entries for layers by name and what was chosen for each."""
    options = step.options
    assert isinstance(options, AllocateBits)
    by_form: dict[BlockFormat, list[str]] = defaultdict(list)
    for name, form in chosen.items():
        by_form[form].append(name)
    shared = {name: getattr(options, name) for name in ("symmetric", "zero_point", "method", "scale_dtype", "accuracy_level")}
    return [
        Step(
            "quantize_matmul",
            QuantizeMatmul(bits=form.bits, block_size=form.block_size, include=tuple(names), **shared),  # type: ignore[arg-type]
            step.position,
        )
        for form, names in sorted(by_form.items(), key=lambda item: (item[0].bits, item[0].block_size))
    ]
