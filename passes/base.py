"""What a pass is: frozen options that turn one graph into another and say what they did."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

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


class OptionError(PassError, ValueError):
    """Options that a class does not have or does not take: which, and what would be right."""


@dataclass(frozen=True)
class Outcome:
    """What a pass did: names rewritten, names left alone with a sentence each, and remarks."""

    rewritten: tuple[str, ...] = ()
    skipped: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Options(BaseModel):
    """Options that cannot change, cannot be misspelt and cannot be coerced from another type.

    Raises:
        OptionError: an option is missing, unknown or of another type.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    if not TYPE_CHECKING:  # to a type checker the fields are the arguments

        def __init__(self, **options: Any) -> None:
            try:
                super().__init__(**{name: _as_tuples(value) for name, value in options.items()})
            except ValidationError as errors:
                raise OptionError(f"{type(self).__name__}: {option_mistake(first_mistake(errors), type(self))}") from None

        # options of a recipe are validated without this call: their mistakes keep the place where they stand
        __init__.__pydantic_base_init__ = True


def _as_tuples(value: Any) -> Any:
    """Lists, in which everybody writes several values, as the tuples that cannot change."""
    return tuple(_as_tuples(entry) for entry in value) if isinstance(value, list) else value


def first_mistake(errors: ValidationError) -> ErrorDetails:
    """The mistake to talk about: an unknown option before all others, since it may be the one that is missed."""
    return min(errors.errors(), key=lambda error: error["type"] != "extra_forbidden")


def option_mistake(error: ErrorDetails, kind: type[Options]) -> str:
    """One sentence for what pydantic has against the options of `kind`."""
    name = ".".join(str(part) for part in error["loc"])
    match error["type"]:
        case "extra_forbidden":
            known = sorted(kind.model_fields, key=lambda field: field not in kind.__annotations__)  # its own before shared ones
            near = difflib.get_close_matches(name.rpartition(".")[2].lower(), known, n=1, cutoff=0.5)
            remedy = f"Did you mean '{near[0]}'?" if near else f"Options: {', '.join(known) or 'none'}."
            return f"unknown option '{name}'. {remedy}"
        case "missing":
            return f"the option '{name}' is required."
        case "literal_error":
            return f"{name} is {error['input']!r}; expected {error['ctx']['expected']}."
        case "value_error":
            return f"{name}: {error['ctx']['error']}" if name else f"{error['ctx']['error']}."
    message = error["msg"].replace("Input should be", "expected")
    message = message.replace("a valid array", "a list").replace("a valid tuple", "a list")
    return f"{name} is {error['input']!r}; {message[0].lower()}{message[1:]}."


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
