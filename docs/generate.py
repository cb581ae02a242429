"""Recipe options and commands -> the reference pages. mkdocs calls `on_page_markdown` for every page.

A page says `<!-- options: sections -->` (or `passes`, or `methods`) or `<!-- commands -->` where it wants a reference. All
of it is made from the JSON schema of recipes and from the command line itself, so it cannot differ from them.
"""

from __future__ import annotations

import json
import re
from typing import Any

import typer

from lowbit.passes.base import Options
from lowbit.passes.quant.method import Method
from lowbit.passes.registry import find_method, find_pass
from lowbit.pipeline.__main__ import app
from lowbit.pipeline.recipe.json_schema import recipe_schema

Schema = dict[str, Any]
ANY_METHOD = "a method, or one with its options"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the references that a page asks for."""
    schema = recipe_schema()
    markdown = re.sub(r"<!-- options: (\w+) -->", lambda wanted: options_reference(schema, wanted[1]), markdown)
    return markdown.replace("<!-- commands -->", commands_reference())


def options_reference(schema: Schema, kind: str) -> str:
    """Markdown of every section, pass or method: a heading, what it does, a table of its options."""
    found = {"sections": _sections, "passes": _passes, "methods": _methods}[kind](schema)
    anchors = {name: re.sub(r"\W+", "-", f"{kind}-{name}") for name in found}
    return "\n\n".join(f"### {name} {{ #{anchors[name]} }}\n\n{_described(options)}" for name, options in found.items())


def commands_reference() -> str:
    """Markdown of every command: what it does, a table of its arguments and options."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return "\n\n".join(_command(name, command) for name, command in commands.items())


def _sections(schema: Schema) -> dict[str, Schema]:
    """The objects that may stand under each section but `passes`; one for each target under `convert`."""
    found = {}
    for section, allowed in schema["properties"].items():
        objects = [_resolved(one, schema) for one in _alternatives(allowed, schema) if "properties" in _resolved(one, schema)]
        for one in objects if section != "passes" else ():
            target = one["properties"].get("target", {}).get("const")
            found[f"{section}: {target}" if target else section] = one
    return found


def _passes(schema: Schema) -> dict[str, Schema]:
    entries = schema["properties"]["passes"]["items"]["anyOf"]
    return {n: _with_methods(find_pass(n), options) for entry in entries for n, options in entry.get("properties", {}).items()}


def _methods(schema: Schema) -> dict[str, Schema]:
    choices = _passes(schema)["quantize_matmul"]["properties"]["method"]["anyOf"]
    return {
        n: _with_methods(find_method(n), options) for choice in choices for n, options in choice.get("properties", {}).items()
    }


def _with_methods(kind: type[Options], options: Schema) -> Schema:
    """The options with the names of methods as defaults: a schema has only the options of such a default."""
    for name, field in options.get("properties", {}).items():
        default = kind.model_fields[name].default
        if isinstance(default, Method):
            field["default"] = type(default).__module__.rpartition(".")[2]
    return options


def _alternatives(allowed: Schema, schema: Schema) -> list[Schema]:
    """What a value may be, lists and references to definitions left out."""
    allowed = _resolved(allowed, schema)
    inner = allowed.get("anyOf") or allowed.get("oneOf")
    return [leaf for one in inner for leaf in _alternatives(one, schema)] if inner else [allowed]


def _resolved(allowed: Schema, schema: Schema) -> Schema:
    return schema["$defs"][allowed["$ref"].rpartition("/")[2]] if "$ref" in allowed else allowed


def _described(options: Schema) -> str:
    properties, required = options.get("properties", {}), options.get("required", [])
    if not properties:
        return f"{options['description']}\n\nIt has no options."
    rows = [
        f"| `{name}` | {_cell(_values(field))} | {_default(name, field, required)} | {_cell(field.get('description', ''))} |"
        for name, field in properties.items()
    ]
    return "\n".join([options["description"], "", "| option | values | default | meaning |", "|---|---|---|---|", *rows])


def _values(field: Schema) -> str:
    """What may be written, in words."""
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    kinds = field.get("anyOf", [field])
    if any("$ref" in one or "properties" in one for one in kinds):
        return ANY_METHOD
    if "anyOf" in field:
        return " or ".join(_values(one) for one in kinds if one.get("type") != "null")
    if field.get("type") == "array":
        return f"list of: {_values(field['items'])}"
    names = {"integer": "whole number", "number": "number", "string": "text", "boolean": "`true`, `false`"}
    signs = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    limits = [f"{words} {field[key]:g}" for key, words in signs.items() if key in field]
    return ", ".join([names[field["type"]], *limits])


def _default(name: str, field: Schema, required: list[str]) -> str:
    if name in required:
        return "must be given"
    default = field.get("default")
    return "" if default is None else f"`{default if isinstance(default, str) else json.dumps(default)}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _command(name: str, command: Any) -> str:
    rows = [
        f"| `{parameter.name.upper() if parameter.param_type_name == 'argument' else parameter.opts[0]}` "
        f"| {_cell(getattr(parameter, 'help', '') or '')} | {_given(parameter)} |"
        for parameter in command.params
        if parameter.name != "help"
    ]
    table = ["", "| argument or option | meaning | default |", "|---|---|---|", *rows] if rows else []
    return "\n".join([f"### lowbit {name} {{ #{name} }}", "", command.help or "", *table])


def _given(parameter: Any) -> str:
    if parameter.required:
        return "must be given"
    return "" if parameter.default in (None, False) or callable(parameter.default) else f"`{parameter.default}`"
