"""`lowbit sweep`: every combination of some options, each a real recipe and a real run, every step that two share made once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lowbit.passes.base import PassError
from lowbit.pipeline.errors import PipelineError, ValidationFailed
from lowbit.pipeline.recipe.edit import variant
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.recipe.yaml_reader import parse
from lowbit.pipeline.report.plain_text import plain
from lowbit.pipeline.report.result import Comparison, compare_results
from lowbit.pipeline.run.runner import run_recipe
from lowbit.pipeline.run.workspace import locked
from lowbit.pipeline.store.store import Store, writing

ENTRY = re.compile(r"^passes\.(?P<name>[\w.]+?)(\[(?P<number>\d+)\])?\.(?P<option>\w+)$")


@dataclass(frozen=True)
class Axis:
    """An option that is varied.

    Attributes:
        path: `passes.quantize_matmul.bits` (the last entry of that name; `quantize_matmul[0]` is the first),
            `validate.windows`.
    """

    path: str
    values: tuple[Any, ...]

    @property
    def option(self) -> str:
        return self.path.rpartition(".")[2]

    def put(self, content: dict[str, Any], value: Any) -> None:
        """Set the option in a recipe's plain values.

        Raises:
            PipelineError: there is no such place.
        """
        if found := ENTRY.match(self.path):
            name = found["name"]
            entries = [i for i, entry in enumerate(content["passes"]) if name in ([entry] if isinstance(entry, str) else entry)]
            number = int(found["number"] or -1)
            if not entries or number >= len(entries):
                raise PipelineError(f"--vary {self.path}: the recipe has {len(entries)} entries '{name}' under passes.")
            place = entries[number]
            entry = content["passes"][place]
            options = {} if isinstance(entry, str) else entry[name] or {}
            content["passes"][place] = {name: {**options, found["option"]: value}}
            return
        section, _, option = self.path.partition(".")
        if not option or "." in option or section == "passes":
            raise PipelineError(
                f"--vary {self.path}: write passes.<pass>.<option>, passes.<pass>[0].<option> or <section>.<option>."
            )
        there = content.get(section) or {}
        if not isinstance(there, dict):
            there = {"source": there} if section == "model" else {}
        content[section] = {**there, option: value}


def read_axes(texts: list[str]) -> list[Axis]:
    """Axes from `path=value,value` texts; several may stand in one, with spaces between.

    Raises:
        PipelineError: one is no such text.
    """
    axes = []
    for word in itertools.chain.from_iterable(text.split() for text in texts):
        path, equals, values = word.partition("=")
        if not equals or not values:
            raise PipelineError(f"--vary {word}: write an option and its values: passes.quantize_matmul.bits=4,3,2.")
        axes.append(Axis(path, tuple(parse(Path(f"--vary {path}"), value).value for value in values.split(","))))
    if not axes:
        raise PipelineError("--vary: nothing is varied; write an option and its values: passes.quantize_matmul.bits=4,3,2.")
    return axes


def variants(recipe: Recipe, axes: list[Axis], folder: Path) -> list[Recipe]:
    """A recipe for each combination, in files of `folder`.

    Raises:
        PipelineError, RecipeError: a combination makes no recipe.
    """
    found: list[Recipe] = []
    for values in itertools.product(*(axis.values for axis in axes)):
        said = ",".join(f"{axis.option}={value}" for axis, value in zip(axes, values, strict=True))
        name = re.sub(r"[^A-Za-z0-9=,._-]", "_", said)
        if any(other.name == name for other in found):
            raise PipelineError(f"--vary: two combinations would be called {name}; vary other values, or one at a time.")

        def change(content: dict[str, Any], values: tuple[Any, ...] = values) -> None:
            for axis, value in zip(axes, values, strict=True):
                axis.put(content, value)

        found.append(variant(recipe, folder / f"{name}.yaml", change))
    return found


Runs = Callable[[list[Recipe], Path, Path | None, Store, Console], dict[str, str]]
"""Runs recipes into a folder, by a store; returns a sentence for each that failed."""


def sweep(
    recipe: Recipe, axes: list[Axis], build: Path, model: Path | None, console: Console, runs: Runs, store: Store | None = None
) -> Comparison:
    """Run every combination and compare them. One that fails does not stop the others."""
    folder = build / "sweep" / recipe.name
    with writing(build):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder), writing(build):
        recipes = variants(recipe, axes, folder)
        failures = runs(recipes, folder, model, store or Store(build / ".store"), console)
        made = [folder / one.name for one in recipes if one.name not in failures]
        return compare_results(made, folder / "compare.html", failures)


def run_here(recipes: list[Recipe], folder: Path, model: Path | None, store: Store, console: Console) -> dict[str, str]:
    """One after the other, in this process."""
    failures = {}
    for one in recipes:
        if (why := attempt(one, folder, model, store, console)) is not None:
            failures[one.name] = why
            console.print(plain(f"  {one.name} failed: {why}"))
    return failures


def attempt(recipe: Recipe, folder: Path, model: Path | None, store: Store, console: Console) -> str | None:
    """Run a recipe; what went wrong, or None. A missed gate is a result."""
    try:
        run_recipe(recipe, folder, model, console, store)
    except ValidationFailed:
        return None
    except (PipelineError, PassError) as error:
        return str(error).splitlines()[0]
    except Exception as error:  # a bug in one variant must not take the night's other results
        return f"{type(error).__name__}: {error}"
    return None
