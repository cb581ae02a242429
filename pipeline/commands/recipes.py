"""Recipes as Python has them: loaded or built, planned, run and saved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lowbit.pipeline.commands.plan import make_plan
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.estimate.sizes import Plan
from lowbit.pipeline.recipe import recipe as checked_recipe
from lowbit.pipeline.recipe.build import Entry, HandOff, Section, as_text, make_recipe
from lowbit.pipeline.recipe.edit import portable
from lowbit.pipeline.recipe.load import find_recipe
from lowbit.pipeline.recipe.load import load_recipe as load_file
from lowbit.pipeline.recipe.sections import Convert, place_of
from lowbit.pipeline.report.result import Result
from lowbit.pipeline.run.runner import run_recipe
from lowbit.pipeline.store.shared import store_at


class Recipe:
    """A recipe: what to make of which model. Sections and options are called as in YAML.

    Attributes:
        checked: its options, checked.
        said: a sentence for each choice that `recipe_for` made for the user.
    """

    checked: checked_recipe.Recipe
    said: tuple[str, ...] = ()

    def __init__(
        self,
        model: str | Path | Section,
        passes: Sequence[Entry],
        *,
        name: str | None = None,
        export: Section | None = None,
        calibrate: Section | None = None,
        validate: Section | None = None,
        convert: HandOff | Sequence[HandOff] | None = None,
    ) -> None:
        """Check a recipe that is built in Python.

        Args:
            model: a folder, an ONNX file, an id on the Hub, or `{source, revision}`.
            passes: passes, their names, or names with options as in YAML.
            name: what the result is called, by default as the model.
            convert: targets, or their options; none is left out.

        Raises:
            RecipeError: the first thing that is wrong, by the name of the option.
        """
        given = source_of(model) if isinstance(model, str | Path) else model
        sections = {
            "model": given, "export": export, "calibrate": calibrate, "passes": passes, "validate": validate,
            "convert": None if convert is None else _section(hand_offs_of(convert)),
        }  # fmt: skip
        self.checked = make_recipe(name or name_of(model), Path.cwd(), sections)

    @property
    def name(self) -> str:
        """What the result is called."""
        return self.checked.name

    @property
    def model(self) -> str:
        """The whole path of its model, or the id on the Hub."""
        model = self.checked.model
        return str(place_of(self.checked.folder, model.source)) if model.is_folder else model.source

    @property
    def text(self) -> str:
        """The recipe as YAML."""
        return self.checked.text

    def save(self, file: str | Path) -> Path:
        """Write the recipe as YAML that gives the same bytes wherever it lies; its relative paths become absolute elsewhere."""
        path = Path(file)
        moved = path.resolve().parent != self.checked.folder
        path.write_text(as_text(portable(self.checked)) if moved else self.text, "utf-8")
        return path

    def save_new(self, file: Path) -> Path:
        """Write the recipe, unless somebody's own lies there.

        Raises:
            PipelineError: `file` is a folder, or holds something else.
        """
        if file.is_dir():
            raise PipelineError(f"{file.resolve()}: is a folder; name a file with --recipe.")
        if file.exists() and file.read_text("utf-8") != self.text:
            raise PipelineError(
                f"{file.resolve()}: is there and says something else. Run it (`lowbit run {file}`), remove it, or name another "
                "file with --recipe."
            )
        return self.save(file)

    def plan(self, build: str | Path = "build", *, model: str | Path | None = None) -> Plan:
        """What a run would do and how large its result would be; reads no weight and writes nothing."""
        return make_plan(self.checked, Path(build), None if model is None else Path(model))

    def run(
        self,
        build: str | Path = "build",
        *,
        model: str | Path | None = None,
        store: str | None = None,
        console: Console | None = None,
    ) -> Result:
        """Run it; the folder `build`/<name> changes only when everything is done. See `lowbit.run`."""
        place = store_at(Path(build), store)
        override = None if model is None else Path(model)
        return Result(run_recipe(self.checked, Path(build), override, console or Console(), place))

    def __repr__(self) -> str:
        """Its name, and its YAML."""
        return f"# {self.name}\n{self.text}"


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by its file, or by its name: one of `recipes/` here, or one that comes along, such as `demo-q3`.

    Raises:
        RecipeError: there is none, or something is wrong in it, with file:line:column.
    """
    recipe = Recipe.__new__(Recipe)
    recipe.checked = load_file(find_recipe(str(name)))
    return recipe


def source_of(model: str | Path) -> str:
    """What a recipe says of a model: the whole path of one that is here, or the id of one on the Hub."""
    place = place_of(Path(), str(model))
    here = isinstance(model, Path) or place.exists() or str(model).startswith((".", "/", "~"))
    return str(place) if here else str(model)


def name_of(model: Any) -> str:
    """A name for a result: the last part of the model's, in lower case."""
    source = model["source"] if isinstance(model, Mapping) else getattr(model, "source", model)
    return re.sub(r"[^a-z0-9._-]+", "-", place_of(Path(), source).name.lower().removesuffix(".onnx")).strip("-.") or "model"


def hand_offs_of(convert: HandOff | Sequence[HandOff]) -> list[Convert | Mapping[str, Any]]:
    """The hand-offs of a recipe, each with its options."""
    entries = [convert] if isinstance(convert, str | Convert | Mapping) else convert
    return [{"target": entry} if isinstance(entry, str) else entry for entry in entries]


def _section(hand_offs: list[Convert | Mapping[str, Any]]) -> Any:
    """As in YAML: one by itself, several as a list."""
    return hand_offs[0] if len(hand_offs) == 1 else hand_offs
