"""What `import lowbit` offers, and all that the command line calls.

Every function raises `PipelineError` or `PassError`, a sentence that says what to mend, and shows its progress on `console`:
a live line in terminals, one line a step in notebooks and plain logs, nothing with `Console(quiet=True)`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lowbit.passes.trust import trust_folders
from lowbit.pipeline.commands.chat import Chat, answer, open_chat, talk
from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.commands.check_source import check_from_source
from lowbit.pipeline.commands.doctor import Finding, examine, findings_table
from lowbit.pipeline.commands.figures import plan_figures
from lowbit.pipeline.commands.plan import plan_tables
from lowbit.pipeline.commands.quantize import recipe_for
from lowbit.pipeline.commands.recipes import Recipe, load_recipe
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.estimate.sizes import Plan
from lowbit.pipeline.recipe.build import Entry, HandOff, Section
from lowbit.pipeline.report.result import Comparison, Result, compare_results

__all__ = [
    "Chat", "Comparison", "Finding", "Plan", "Recipe", "Result", "answer", "chat", "check", "compare", "doctor",
    "findings_table", "frontier", "load_recipe", "measure", "plan", "plan_figures", "plan_tables", "quantize", "recipe_for",
    "run", "schema", "sweep", "talk", "trust_plugins",
]  # fmt: skip

if sys.platform == "win32":
    raise PipelineError("lowbit runs on Linux and macOS. On Windows, run it in WSL: https://learn.microsoft.com/windows/wsl")

Place = str | Path


def quantize(
    model: Place,
    passes: Sequence[Entry] | None = None,
    *,
    bits: int | None = None,
    block_size: int = 64,
    method: str = "mse",
    fit: str | None = None,
    convert: HandOff | Sequence[HandOff] | None = None,
    calibrate: Section | None = None,
    validate: Section | bool = True,
    export: Section | None = None,
    name: str | None = None,
    build: Place = "build",
    store: str | None = None,
    console: Console | None = None,
) -> Result:
    """Quantize a model with what is best for it where nothing is said; see `recipe_for`, which makes the recipe that runs.

    Args:
        model: a folder, an ONNX file, or an id on the Hugging Face Hub.
        build: where the result goes, in a folder of the recipe's name.
        store: where finished steps are kept, `build`/.store by default.
    """
    recipe = recipe_for(
        model, passes, bits=bits, block_size=block_size, method=method, fit=fit, convert=convert, calibrate=calibrate,
        validate=validate, export=export, name=name,
    )  # fmt: skip
    return recipe.run(build, store=store, console=console)


def run(
    recipe: Recipe | Place, build: Place = "build", *, model: Place | None = None, store: str | None = None,
    console: Console | None = None,
) -> Result:  # fmt: skip
    """Run a recipe, given by itself, its file or its name; its folder changes only when everything is done.

    Args:
        model: take the checkpoint from this folder instead.

    Raises:
        ValidationFailed: a gate was missed; the result is kept all the same.
    """
    return _recipe(recipe).run(build, model=model, store=store, console=console)


def plan(recipe: Recipe | Place, build: Place = "build", *, model: Place | None = None) -> Plan:
    """What a run would do and how large its result would be; reads no weight and writes nothing."""
    return _recipe(recipe).plan(build, model=model)


def check(
    folder: Place, *, from_source: bool = False, model: Place | None = None, console: Console | None = None
) -> dict[str, int]:
    """Prove a finished folder again: the manifest's seal, every file and no other, and every code of every engine.

    Args:
        from_source: make it again from the checkpoint, too, recalling nothing, and compare every file of the models. Takes as
            long as the first run.
        model: where the checkpoint is, if not where the recipe says.

    Returns:
        How many `files` and `weights` were checked.
    """
    found = check_folder(Path(folder))
    if from_source:
        check_from_source(Path(folder), None if model is None else Path(model), console or Console())
    return found


def compare(*folders: Place, into: Place = "build/compare.html") -> Comparison:
    """Finished results side by side, and a page of them at `into`."""
    return compare_results([Path(folder) for folder in folders], Path(into))


def chat(folder: Place, *, runtime: str | None = None) -> Chat:
    """Talk to a finished result: its `ask("Hello")` gives the answer piece by piece.

    Args:
        runtime: `mnn`, `genai` or `onnx`, by default the first that is there.
    """
    return open_chat(Path(folder), runtime)


def frontier(
    recipe: Recipe | Place, build: Place = "build", *, model: Place | None = None, points: int = 5,
    console: Console | None = None,
) -> Path:  # fmt: skip
    """How good the model can be at every size, for a recipe with allocate_bits.

    Args:
        points: at how many sizes the KL divergence is measured.

    Returns:
        The folder with frontier.json, .svg and .png.
    """
    from lowbit.pipeline.commands.frontier import frontier as find_frontier

    return find_frontier(_recipe(recipe).checked, Path(build), _path(model), points, console or Console())


def sweep(
    recipe: Recipe | Place, vary: Sequence[str], build: Place = "build", *, model: Place | None = None, on: str | None = None,
    store: str | None = None, console: Console | None = None,
) -> Comparison:  # fmt: skip
    """Run every combination of some options and compare them.

    Args:
        vary: options and their values, `passes.quantize_matmul.bits=4,3,2`.
        on: a Ray cluster, `ray://HOST:PORT`, whose nodes share `build`.
    """
    from lowbit.pipeline.commands.sweep import read_axes, run_here
    from lowbit.pipeline.commands.sweep import sweep as run_sweep
    from lowbit.pipeline.commands.sweep_ray import run_on
    from lowbit.pipeline.store.shared import store_at

    runs = run_here if on is None else run_on(on)
    place = store_at(Path(build), store)
    return run_sweep(
        _recipe(recipe).checked, read_axes(list(vary)), Path(build), _path(model), console or Console(), runs, place
    )


def measure(into: Place = "recipes/targets", build: Place = "build", *, console: Console | None = None) -> list[Path]:
    """How long a product takes at each width on this machine: a table for each engine, for `target:` of allocate_bits."""
    from lowbit.pipeline.commands.measure import measure as measure_here

    return measure_here(Path(into), Path(build), console or Console())


def doctor(build: Place = "build") -> list[Finding]:
    """Whether everything that runs need is here: name, whether it is well, and what was found or what to do."""
    return examine(Path(build))


def schema() -> dict[str, Any]:
    """The JSON schema of recipes, for editors."""
    from lowbit.pipeline.recipe.json_schema import recipe_schema

    return recipe_schema()


def trust_plugins(*folders: Place) -> None:
    """Let recipes name passes, methods and targets that are modules in `folders`; what a program imports itself is trusted.

    Raises:
        PipelineError: one is no folder.
    """
    try:
        trust_folders(*map(Path, folders))
    except (OSError, ValueError) as error:
        raise PipelineError(str(error)) from error


def _recipe(recipe: Recipe | Place) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _path(place: Place | None) -> Path | None:
    return None if place is None else Path(place)
