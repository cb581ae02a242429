"""Sensitivities, sizes and times of every choice -> the choice of least expected loss: an integer program, solved exactly."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from lowbit.passes.quant.format import BlockFormat
from lowbit.pipeline.errors import PipelineError

Choice = tuple[str, BlockFormat]
"""A group of weights, by name, and the form that it may take."""


@dataclass(frozen=True)
class Solution:
    """What was chosen for each group of weights.

    Attributes:
        chosen: by group.
        expected_loss: the sum of sensitivities over groups.
        size: bytes of all groups.
        gap: how far the expected loss may be from the least possible one, as a share of it.
        time: of all groups, relative to 4 bits; None where it does not count.
    """

    chosen: dict[str, BlockFormat]
    expected_loss: float
    size: int
    gap: float
    time: float | None = None


@dataclass(frozen=True)
class Costs:
    """What each form of each group costs: expected loss, bytes, and time (empty where it does not count)."""

    sensitivities: dict[Choice, float]
    sizes: dict[Choice, int]
    times: dict[Choice, float] = field(default_factory=dict)


def solve(costs: Costs, budget: int, longest: float | None = None) -> Solution:
    """One form for each group so that sizes sum to at most `budget` bytes, times to `longest`, sensitivities to the least.

    The multiple-choice knapsack as an integer program, by HiGHS (Huangfu and Hall, doi:10.1007/s12532-017-0130-5).

    Raises:
        PipelineError: even the smallest forms are larger, or the fastest slower.
    """
    sensitivities, sizes, times = costs.sensitivities, costs.sizes, costs.times
    groups = list(dict.fromkeys(group for group, _ in sensitivities))
    forms = list(dict.fromkeys(form for _, form in sensitivities))
    _check_least(costs, groups, forms, budget, longest)
    choices = [(group, form) for group in groups for form in forms]
    loss = np.array([sensitivities[choice] for choice in choices])
    size = np.array([float(sizes[choice]) for choice in choices])
    rows = np.repeat(np.arange(len(groups)), len(forms))
    one_each = csr_array((np.ones(len(choices)), (rows, np.arange(len(choices)))))
    scale = max(float(loss.max()), np.finfo(np.float64).tiny)
    limits = [LinearConstraint(one_each, 1, 1), LinearConstraint(size[None] / budget, -np.inf, 1.0)]
    if longest is not None:
        limits.append(LinearConstraint(np.array([[times[choice] / longest for choice in choices]]), -np.inf, 1.0))
    solved = milp(
        loss / scale, integrality=np.ones(len(choices)), bounds=Bounds(0, 1), options={"mip_rel_gap": 0.0, "time_limit": 60.0},
        constraints=limits,
    )  # fmt: skip
    if solved.x is None:
        both = "" if longest is None else f" that are as fast as max_relative_time: {longest:g} asks for"
        raise PipelineError(f"no choices{both} fit into {budget:,} bytes ({solved.message})")
    picked = solved.x.reshape(len(groups), len(forms)).argmax(1)
    chosen = {group: forms[i] for group, i in zip(groups, picked, strict=True)}
    total = sum(sizes[choice] for choice in chosen.items())
    if total > budget:  # the solver's tolerance is a millionth of the budget
        return solve(costs, budget - (total - budget), longest)
    time = None if longest is None else sum(times[choice] for choice in chosen.items())
    return Solution(chosen, sum(sensitivities[choice] for choice in chosen.items()), total, float(solved.mip_gap or 0.0), time)


def _check_least(costs: Costs, groups: list[str], forms: list[BlockFormat], budget: int, longest: float | None) -> None:
    """Refuse limits that even the smallest or the fastest forms exceed."""
    smallest = sum(min(costs.sizes[group, form] for form in forms) for group in groups)
    if smallest > budget:
        raise PipelineError(f"the smallest choices take {smallest:,} bytes, {budget:,} are left for them")
    if longest is None:
        return
    fastest = sum(min(costs.times[group, form] for form in forms) for group in groups)
    if fastest > longest:
        raise PipelineError(f"the fastest choices take {fastest:.3f} of the time of 4 bits, {longest:g} are allowed")
