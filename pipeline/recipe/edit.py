"""A recipe, changed: for another folder, a sweep, or a point of a frontier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.recipe.names import check_name
from lowbit.pipeline.recipe.recipe import PassEntry, Recipe
from lowbit.pipeline.recipe.yaml_reader import parse

PATHS = {"model": ("source",), "validate": ("text", "inputs"), "calibrate": ("text", "prompts")}
"""Options that may be paths relative to the recipe."""


def portable(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values that mean the same wherever they are written: its paths are absolute."""
    content: dict[str, Any] = parse(recipe.file, recipe.text).value
    if isinstance(source := content["model"], str) and source.startswith("."):
        content["model"] = str((recipe.folder / source).resolve())
    for section, names in PATHS.items():
        value = content.get(section)
        if not isinstance(value, dict):
            continue
        for name in names:
            if isinstance(path := value.get(name), str) and _is_there(recipe.folder / path):
                value[name] = str((recipe.folder / path).resolve())
    for entry in content["passes"]:
        if isinstance(entry, dict) and isinstance(options := entry.get("allocate_bits"), dict) and "target" in options:
            target = str(options["target"])
            path = target if target.endswith((".yaml", ".yml")) else f"targets/{target}.yaml"
            if _is_there(recipe.folder / path):
                options["target"] = str((recipe.folder / path).resolve())
    return content


def _is_there(path: Path) -> bool:
    """Whether a path leads to something; no name too long, or with a NUL, does."""
    try:
        return path.exists()
    except OSError:
        return False


def variant(recipe: Recipe, file: Path, change: Callable[[dict[str, Any]], None]) -> Recipe:
    """`recipe` with its values changed, written to `file` and read again as any recipe.

    Raises:
        RecipeError: the change makes no recipe, or the file's name is none for a result.
    """
    check_name(file.stem, file)
    content = portable(recipe)
    change(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False, width=120), "utf-8")
    return load_recipe(file)


def put_steps(content: dict[str, Any], place: int, steps: list[PassEntry]) -> None:
    """Write `steps` into a recipe's plain values, in place of the entry number `place`."""
    entries = [{step.name: step.options.model_dump(mode="json", exclude_defaults=True)} for step in steps]
    content["passes"][place : place + 1] = entries


def with_steps(recipe: Recipe, place: int, steps: list[PassEntry]) -> Recipe:
    """`recipe` with `steps` in place of its entry number `place`, and a text that says so."""
    content = portable(recipe)
    put_steps(content, place, steps)
    text = f"# what {recipe.file.name} chose; running this makes the same bytes\n"
    text += yaml.safe_dump(content, sort_keys=False, width=120)
    return replace(recipe, passes=(*recipe.passes[:place], *steps, *recipe.passes[place + 1 :]), text=text)


def plain_steps(recipe: Recipe) -> list[PassEntry]:
    """The passes with codes by plain rounding; none where the recipe does nothing better."""
    steps = [replace(step, options=plain) for step in recipe.passes if (plain := step.options.plain) is not None]
    return [] if steps == list(recipe.passes) else steps
