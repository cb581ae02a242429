"""Recipes: YAML, and what the sections say."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.recipe.load import RECIPES as COME_ALONG
from lowbit.pipeline.recipe.load import load_recipe
from tests.fuzz.target import LARGEST, Target
from tests.hostile.recipes import RECIPES


def prepare(folder: Path) -> Target:
    file = folder / "fuzz.yaml"

    def attempt(data: bytes) -> None:
        file.write_bytes(data)
        load_recipe(file)

    right = [path.read_bytes() for path in sorted(COME_ALONG.glob("*.yaml"))]
    return Target(right + [text for text, _ in RECIPES.values() if len(text) <= LARGEST], attempt)
