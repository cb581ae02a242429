"""The JSON schema of recipes, made from the very classes that check them."""

from __future__ import annotations

from typing import Any

from lowbit import passes
from lowbit.passes import methods
from lowbit.passes.base import Options
from lowbit.passes.registry import find_method, find_pass, names_in
from lowbit.pipeline.recipe.sections import SECTIONS, Model
from lowbit.pipeline.recipe.targets import DEFAULT, find_options, target_names


def recipe_schema() -> dict[str, Any]:
    """A schema (JSON Schema 2020-12) that editors use to complete and check recipes/*.yaml."""
    method_names = names_in(methods)
    with_options = [
        {"type": "object", "properties": {n: _options(find_method(n))}, "required": [n], "additionalProperties": False}
        for n in method_names
    ]
    method = {"anyOf": [{"enum": method_names}, *with_options]}
    entries: list[dict[str, Any]] = []
    for name in names_in(passes):
        kind = find_pass(name)
        options = _options(kind)
        if "method" in options.get("properties", {}):
            options["properties"]["method"] = {**method, "description": "How codes are chosen: a file of passes/methods/."}
        described = {"description": (kind.__doc__ or "").splitlines()[0], "properties": {name: options}}
        entries.append({"type": "object", **described, "required": [name], "additionalProperties": False})
        if not options.get("required"):
            entries.append({"const": name, "description": described["description"]})
    sections = {name: _options(kind) for name, kind in SECTIONS.items() if kind is not Model}
    hand_off = {"anyOf": [_hand_off(name) for name in target_names()]}
    sections["convert"] = {"anyOf": [hand_off, {"type": "array", "items": hand_off}]}
    source = {"type": "string", "minLength": 1, "description": (Model.__doc__ or "").splitlines()[0]}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "lowbit recipe",
        "type": "object",
        "properties": {
            "model": {"anyOf": [source, _options(Model)]},
            "passes": {"type": "array", "minItems": 1, "items": {"anyOf": entries}},
            **sections,
        },
        "required": ["model", "passes"],
        "additionalProperties": False,
    }


def _hand_off(target: str) -> dict[str, Any]:
    """The schema of one target's options; all but the default one are named."""
    schema = _options(find_options(target))
    return schema if target == DEFAULT else {**schema, "required": ["target"]}


def _options(kind: type[Options]) -> dict[str, Any]:
    """The schema of one class, its fields described by the docstrings beneath them."""
    schema = kind.model_json_schema()
    schema.pop("title", None)
    for field in schema.get("properties", {}).values():
        field.pop("title", None)
    return schema
