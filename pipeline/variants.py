"""A recipe, changed: for another folder, a sweep, or a point of a frontier."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipeline.recipe import Recipe, load_recipe

PATHS = {"model": ("source",), "validate": ("text", "inputs"), "calibrate": ("text", "prompts")}
"""Options that may be paths relative to the recipe."""


def portable(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values that mean the same wherever they are written: its paths are absolute."""
    content: dict[str, Any] = yaml.safe_load(recipe.text)
    if isinstance(source := content["model"], str) and source.startswith("."):
        content["model"] = str((recipe.folder / source).resolve())
    for section, names in PATHS.items():
        value = content.get(section)
        if not isinstance(value, dict):
            continue
        for name in names:
            if isinstance(path := value.get(name), str) and (recipe.folder / path).exists():
                value[name] = str((recipe.folder / path).resolve())
    for entry in content["passes"]:
        if isinstance(entry, dict) and isinstance(options := entry.get("allocate_bits"), dict) and "target" in options:
            target = str(options["target"])
            path = target if target.endswith((".yaml", ".yml")) else f"targets/{target}.yaml"
            options["target"] = str((recipe.folder / path).resolve())
    return content


def variant(recipe: Recipe, file: Path, change: Callable[[dict[str, Any]], None]) -> Recipe:
    """`recipe` with its values changed, written to `file` and read again as any recipe.

    Raises:
        RecipeError: the change makes no recipe.
    """
    content = portable(recipe)
    change(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump(content, sort_keys=False, width=120), "utf-8")
    return load_recipe(file)
