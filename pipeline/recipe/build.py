"""A recipe from Python values: the same words as in YAML, and a text that gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lowbit.passes.base import Options, Pass
from lowbit.passes.registry import word_of
from lowbit.pipeline.recipe.edit import portable
from lowbit.pipeline.recipe.load import check_recipe
from lowbit.pipeline.recipe.names import check_name
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.recipe.sections import ORDER, Convert
from lowbit.pipeline.recipe.yaml_reader import PlainValues

Entry = Pass | str | Mapping[str, Any]
"""A pass, or what stands for it in YAML: its name, or its name with its options."""
Section = Options | Mapping[str, Any]
"""Options of a section, as an object or as in YAML."""
HandOff = str | Convert | Mapping[str, Any]
"""A target by its name, or with its options."""


def make_recipe(name: str, folder: Path, sections: Mapping[str, Any]) -> Recipe:
    """A checked recipe of sections as in YAML; passes and options may be objects.

    Args:
        name: what the result is called.
        folder: what relative paths start from; the recipe's text has absolute ones, so that it may be saved anywhere.
        sections: those that are None are left out.

    Raises:
        RecipeError: the first thing that is wrong, by the name of the option: `passes[0].quantize_matmul.bits`.
    """
    check_name(name, folder)
    content = {key: _plain(sections[key]) for key in ORDER if sections.get(key) is not None}
    content |= {key: value for key, value in sections.items() if key not in ORDER}
    if isinstance(passes := sections.get("passes"), Sequence) and not isinstance(passes, str):
        content["passes"] = [_entry(entry) for entry in passes]
    file = folder / f"{name}.yaml"
    checked = check_recipe(PlainValues(file, as_text(content), content))
    moved = portable(checked)
    return check_recipe(PlainValues(file, as_text(moved), moved))


def as_text(content: Mapping[str, Any]) -> str:
    """YAML of a recipe's plain values."""
    return yaml.safe_dump(dict(content), sort_keys=False, width=120, allow_unicode=True, default_flow_style=None)


def _plain(value: Any) -> Any:
    """Values that YAML can hold."""
    if isinstance(value, Options):
        target = {"target": value.target} if isinstance(value, Convert) else {}
        return target | value.model_dump(mode="json", exclude_defaults=True)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path) else value


def _entry(entry: Any) -> Any:
    if not isinstance(entry, Pass):
        return _plain(entry)
    name, options = word_of(entry), _plain(entry)
    return {name: options} if options else name
