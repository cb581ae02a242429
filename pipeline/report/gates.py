"""Gates: limits of a recipe, held against the figures of its result."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Literal

from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.report.facts import Facts
from lowbit.pipeline.report.quality import Quality

GateName = Literal["max_kl_divergence", "max_perplexity_ratio", "max_relative_error"]
FIGURES: dict[GateName, Callable[[Quality], float | None]] = {
    "max_kl_divergence": attrgetter("kl_divergence"),
    "max_perplexity_ratio": attrgetter("perplexity_ratio"),
    "max_relative_error": attrgetter("relative_error"),
}
"""The figure that each gate of the section `validate` limits."""


class Gate(Facts):
    """A limit, and what was found."""

    name: GateName
    allowed: float
    found: float | None
    """None where the figure was not measured."""
    passed: bool

    @property
    def measured(self) -> str:
        """What was found, in words."""
        return "not measured" if self.found is None else f"{self.found:.4f}"

    @classmethod
    def held(cls, name: GateName, allowed: float, quality: Quality) -> Gate:
        """The gate, held against figures; what is not a number passes none."""
        found = FIGURES[name](quality)
        return cls(name=name, allowed=allowed, found=found, passed=found is not None and found <= allowed)


def gates(options: Validate, quality: Quality) -> tuple[Gate, ...]:
    """Every gate that a recipe sets."""
    limits = {name: getattr(options, name) for name in FIGURES}
    return tuple(Gate.held(name, limit, quality) for name, limit in limits.items() if limit is not None)
