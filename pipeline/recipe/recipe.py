"""A recipe that was read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import onnx_graphsurgeon as gs

from lowbit.passes.base import Outcome, Pass, PassError
from lowbit.pipeline.errors import OptionName, Position
from lowbit.pipeline.recipe.names import check_name
from lowbit.pipeline.recipe.sections import Calibrate, Convert, Export, Model, Validate


@dataclass(frozen=True)
class PassEntry:
    """One entry under `passes:`."""

    name: str
    options: Pass
    position: Position | OptionName

    def apply(self, graph: gs.Graph) -> Outcome:
        """Apply the pass; rewriting nothing is an error unless the pass says otherwise.

        Raises:
            PassError: with a note that names this entry.
        """
        try:
            outcome = self.options.apply(graph)
            if not outcome.rewritten and not self.options.may_rewrite_nothing:
                raise PassError("rewrote nothing.")
        except PassError as error:
            error.add_note(f"in {self.name}, {self.position}")
            raise
        return outcome


@dataclass(frozen=True)
class Recipe:
    """A recipe, checked. `calibrate` and `validate` are None, `convert` is empty when the recipe leaves them out.

    Raises:
        RecipeError: its name is not safe as that of a folder.
    """

    name: str
    file: Path
    text: str
    model: Model
    export: Export
    calibrate: Calibrate | None
    passes: tuple[PassEntry, ...]
    validate: Validate | None
    convert: tuple[Convert, ...]

    def __post_init__(self) -> None:
        check_name(self.name, self.file)

    @property
    def folder(self) -> Path:
        return self.file.resolve().parent
