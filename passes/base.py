"""What a pass is: frozen options that turn one graph into another and say what they did."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER
from pydantic import BaseModel, ConfigDict

# graphsurgeon warns about every bfloat16 weight, which stays as it is here
G_LOGGER.severity = G_LOGGER.ERROR


Phase = Literal["allocation", "scaling", "calibration", "training"]
"""What a run does for a pass beyond applying it. `allocation`: replaces it by passes with bits that a budget allows, before
any is applied; `scaling`: searches scales of inputs; `calibration`: chooses codes for the inputs that layers see; `training`:
trains codes and scales."""
READING: frozenset[Phase] = frozenset({"scaling", "calibration", "training"})
"""Phases that read the text of the section `calibrate`."""


class PassError(Exception):
    """The graph does not allow what the pass was asked to do: what, where, and what would be right."""


@dataclass(frozen=True)
class Outcome:
    """What a pass did: names rewritten, names left alone with a sentence each, and remarks."""

    rewritten: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Options(BaseModel):
    """Options that cannot change, cannot be misspelt and cannot be coerced from another type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class Pass(Options):
    """Turns a graph into another. Its fields are its options, its documentation and its cache key."""

    def apply(self, graph: gs.Graph) -> Outcome:
        """Rewrite `graph` in place; raise `PassError` if it does not allow it."""
        raise TypeError(f"{type(self).__name__} does not say how it rewrites a graph")

    @property
    def phases(self) -> frozenset[Phase]:
        """What the pass leaves to a run that has data; empty if the graph is all that it needs."""
        return frozenset()

    @property
    def plain(self) -> Pass | None:
        """What results are compared with: the pass with codes by plain rounding, None if it only makes rounding better."""
        return self

    @property
    def keeps_shapes(self) -> bool:
        """Whether it changes values alone: a plan, which knows names and shapes only, leaves it out."""
        return False

    @property
    def changes_outputs(self) -> bool:
        """Whether the graph has other outputs afterwards: then the float model gets the pass, too, before both are compared."""
        return False

    @property
    def may_rewrite_nothing(self) -> bool:
        """Whether finding nothing to rewrite is fine: true of tidying, false of what a user asked for."""
        return False
