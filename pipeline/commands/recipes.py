"""Recipes as Python has them: loaded, built, planned, run and saved."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lowbit.pipeline.checkpoint.resolve import open_model
from lowbit.pipeline.commands.defaults import Wanted, choose
from lowbit.pipeline.commands.plan import make_plan
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.estimate.sizes import Plan
from lowbit.pipeline.recipe import recipe as checked_recipe
from lowbit.pipeline.recipe.build import Entry, Section, as_text, make_recipe
from lowbit.pipeline.recipe.edit import portable
from lowbit.pipeline.recipe.load import find_recipe
from lowbit.pipeline.recipe.load import load_recipe as load_file
from lowbit.pipeline.recipe.sections import Convert
from lowbit.pipeline.report.result import Result
from lowbit.pipeline.run.runner import run_recipe
from lowbit.pipeline.store.shared import store_at


class Recipe:
    """A recipe: what to make of which model. Sections and options are called as in YAML.

    Attributes:
        checked: its options, checked.
        said: a sentence for each choice that was made for the user; see `recipe_for`.
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
        convert: str | Section | Sequence[str | Section] | None = None,
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
        given = (
            model if isinstance(model, Mapping) else {"source": source_of(model)} if isinstance(model, str | Path) else model
        )
        sections = {
            "model": given, "export": export, "calibrate": calibrate, "passes": passes, "validate": validate,
            "convert": None if convert is None else _hand_offs(convert),
        }  # fmt: skip
        self.checked = make_recipe(name or name_of(model), Path.cwd(), sections)

    @property
    def name(self) -> str:
        """What the result is called."""
        return self.checked.name

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
            PipelineError: `file` holds something else.
        """
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


def recipe_for(
    model: str | Path,
    passes: Sequence[Entry] | None = None,
    *,
    bits: int | None = None,
    block_size: int = 64,
    method: str = "mse",
    fit: str | None = None,
    convert: str | Section | Sequence[str | Section] | None = None,
    calibrate: Section | None = None,
    validate: Section | bool = True,
    export: Section | None = None,
    name: str | None = None,
) -> Recipe:
    """The recipe for a model in which everything that is not said is chosen for that model; `said` tells what and why.

    A model on the Hub is fetched for it: the choice depends on its configuration and on the types of its weights.

    Args:
        passes: in place of bits, block_size, method and fit; what the model needs besides is put before them.
        bits: 2, 3, 4 or 8, by default 4.
        fit: the largest size of the first hand-off instead, `3.2GB`: bits are chosen for each weight.
        convert: targets, or their options; by default the one that takes such models.
        validate: True chooses how much text; False leaves it out.

    Raises:
        PipelineError: the model cannot be found or read, or options contradict each other.
    """
    if fit is not None and bits is not None:
        raise PipelineError(f"bits {bits} and fit {fit} contradict each other: fit chooses the bits. Give one of them.")
    if passes is not None and (fit is not None or bits is not None):
        raise PipelineError("passes say all about bits; give either passes, or bits or fit.")
    hand_offs = None if convert is None else _hand_offs(convert)
    targets = tuple(one["target"] if isinstance(one, Mapping) else one.target for one in hand_offs or ())
    source = source_of(model)
    chosen = choose(open_model(source), Wanted(bits, block_size, method, targets, fit), passes)
    sections = chosen.sections
    given = {"export": export, "calibrate": calibrate, "convert": hand_offs}
    sections |= {key: value for key, value in given.items() if value is not None}
    if not isinstance(validate, bool):
        sections["validate"] = validate
    elif not validate:
        del sections["validate"]
    ending = "" if passes is not None else f"-fit-{fit.replace(' ', '').lower()}" if fit else f"-q{bits or 4}"
    recipe = Recipe(source, name=name or f"{name_of(model)}{ending}", **sections)
    recipe.said = tuple(chosen.said)
    return recipe


def source_of(model: str | Path) -> str:
    """What a recipe says of a model: the whole path of one that is here, or the id of one on the Hub."""
    path = Path(model).expanduser()
    here = isinstance(model, Path) or path.exists() or str(model).startswith((".", "/", "~"))
    return str(path.resolve()) if here else str(model)


def name_of(model: Any) -> str:
    """A name for a result: the last part of the model's, in lower case."""
    source = model["source"] if isinstance(model, Mapping) else getattr(model, "source", model)
    return (
        re.sub(r"[^a-z0-9._-]+", "-", Path(source).expanduser().resolve().name.lower().removesuffix(".onnx")).strip("-")
        or "model"
    )


def _hand_offs(convert: str | Section | Sequence[str | Section]) -> list[Any]:
    entries = [convert] if isinstance(convert, str | Mapping | Convert) else list(convert)
    return [{"target": one} if isinstance(one, str) else one for one in entries]
