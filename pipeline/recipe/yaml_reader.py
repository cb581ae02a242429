"""YAML with positions, and without its surprises.

Plain YAML keeps the last of two equal keys, reads `no` as false and `1e-3` as text. Here each of these is an
error that says where, as are anchors (which can blow up a small file) and tags (which can run code).
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lowbit.pipeline.errors import OptionName, Position, RecipeError
from lowbit.pipeline.limits import MAX_BYTES, MAX_DEPTH, MAX_INTEGER, MAX_NODES, MAX_TEXT

_NUMBER = re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d+)[eE][-+]?\d+")
_PLAIN_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}


@dataclass
class Document:
    """A YAML file as plain values, and the position of every key and value by its path."""

    file: Path
    text: str = ""
    value: Any = None
    values: dict[tuple[Any, ...], Position] = field(default_factory=dict)
    keys: dict[tuple[Any, ...], Position] = field(default_factory=dict)

    def position(self, path: tuple[Any, ...]) -> Position | OptionName:
        """Where `path` stands, or the nearest thing around it."""
        while path not in self.values and path:
            path = path[:-1]
        return self.values.get(path, Position(self.file, 1, 1))

    def key(self, path: tuple[Any, ...]) -> Position | OptionName:
        """Where the key at the end of `path` stands; where its value does if it has none."""
        return self.keys.get(path) or self.position(path)


class PlainValues(Document):
    """Values that were built in Python: their places are the names of options."""

    def position(self, path: tuple[Any, ...]) -> Position | OptionName:
        return OptionName(path)


def read(file: Path) -> Document:
    """Parse a YAML file.

    Raises:
        RecipeError: file:line:column and what would be right.
    """
    return parse(file, _text(file))


def read_table(file: Path) -> Any:
    """The plain values of a YAML file that is no recipe: its keys may be numbers.

    Raises:
        RecipeError: file:line:column and what would be right.
    """
    node = _compose(file, _text(file))
    try:
        return None if node is None else yaml.constructor.SafeConstructor().construct_document(node)
    except (yaml.YAMLError, ValueError, LookupError, TypeError) as error:
        raise RecipeError(file, f"has a value that cannot be read: {error}") from error


def _text(file: Path) -> str:
    try:
        if not file.is_file():
            raise RecipeError(file, "cannot be read: it is no regular file.")
        if file.stat().st_size > MAX_BYTES:
            raise RecipeError(file, f"larger than {MAX_BYTES >> 20} MiB: not a recipe.")
        return file.read_text("utf-8")
    except (OSError, ValueError) as error:
        raise RecipeError(file, f"cannot be read: {error}") from error


def parse(file: Path, text: str) -> Document:
    """The values of YAML text.

    Args:
        file: what the text is of, for positions.

    Raises:
        RecipeError: file:line:column and what would be right.
    """
    document = Document(file, text)
    node = _compose(file, text)
    document.value = _value(document, node, ()) if node is not None else None
    return document


def _compose(file: Path, text: str) -> yaml.Node | None:
    try:
        return _Composer(file, text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise RecipeError(_position(file, mark) if mark else file, f"not YAML: {error.problem}.") from error
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as error:
        raise RecipeError(file, f"not YAML: {error}") from error


class _Composer(yaml.composer.Composer, yaml.resolver.Resolver):  # type: ignore[misc]
    """Builds nodes, so many and so deep and no more, of what libyaml reads; nothing of it may be repeated by name."""

    def __init__(self, file: Path, text: str) -> None:
        yaml.composer.Composer.__init__(self)
        yaml.resolver.Resolver.__init__(self)
        events = yaml.CSafeLoader(text)
        self.check_event, self.peek_event, self.get_event = events.check_event, events.peek_event, events.get_event
        self.file, self.nodes, self.depth = file, 0, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        here = _position(self.file, event.start_mark)
        self.nodes += 1
        self.depth += 1
        if event.anchor is not None:
            raise RecipeError(here, "anchors and aliases are not supported.")
        if self.depth > MAX_DEPTH:
            raise RecipeError(here, "nested too deeply.")
        if self.nodes > MAX_NODES:
            raise RecipeError(here, f"has more than {MAX_NODES:,} values: not a recipe.")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _position(file: Path, mark: Any) -> Position:
    return Position(file, mark.line + 1, mark.column + 1)


def _value(document: Document, node: yaml.Node, path: tuple[Any, ...]) -> Any:
    here = _position(document.file, node.start_mark)
    document.values[path] = here
    if node.tag not in _PLAIN_TAGS:
        kind = node.tag.rpartition(":")[2]
        if kind == "timestamp":
            _check_text(here, node.value)
            return str(node.value)
        raise RecipeError(here, f"the tag or type '{kind}' is not supported; write plain values.")
    if isinstance(node, yaml.SequenceNode):
        return [_value(document, item, (*path, i)) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode):
        return _mapping(document, node, path)
    return _scalar(here, node)


def _mapping(document: Document, node: yaml.MappingNode, path: tuple[Any, ...]) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        here = _position(document.file, key_node.start_mark)
        key = key_node.value
        if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
            what = repr(key) if isinstance(key_node, yaml.ScalarNode) else "a list or a mapping"
            raise RecipeError(here, f"a key must be plain text, not {what}.")
        _check_text(here, key)
        if key in mapping:
            first = document.keys[*path, key]
            raise RecipeError(here, f"'{key}' is here twice; first in line {first.line}. Remove one.")
        document.keys[*path, key] = here
        mapping[key] = _value(document, value_node, (*path, key))
    return mapping


def _scalar(here: Position, node: yaml.ScalarNode) -> Any:
    text, plain = str(node.value), not node.style
    _check_text(here, text)
    kind = node.tag.rpartition(":")[2]
    if kind == "bool" and text.lower() not in ("true", "false"):
        raise RecipeError(here, f"'{text}' means {text.lower() in ('yes', 'on')} in YAML. Write true or false, or quote it.")
    if kind == "str" and plain and _NUMBER.fullmatch(text):
        mantissa, exponent = re.split("[eE]", text)
        sign = exponent if exponent[0] in "+-" else f"+{exponent}"
        right = f"{mantissa if '.' in mantissa else mantissa + '.0'}e{sign}"
        raise RecipeError(here, f"'{text}' is text in YAML, not a number. Write {right}.")
    if kind == "int" and plain and (":" in text or re.fullmatch(r"[-+]?0\d+", text)):
        raise RecipeError(here, f"'{text}' is a number to base 60 or 8 in YAML. Quote it, or write it in base 10.")
    try:
        value = yaml.constructor.SafeConstructor().construct_object(node)
    except (ValueError, LookupError) as error:  # what a tag promises, or more digits than Python reads
        raise RecipeError(here, f"'{text[:40]}' cannot be read as {kind}. Write a plain value.") from error
    if isinstance(value, int) and abs(value) > MAX_INTEGER:
        raise RecipeError(here, f"'{text[:40]}' is too large a number; the largest is {MAX_INTEGER}.")
    return value


def _check_text(here: Position, text: str) -> None:
    """Refuse what no name, path or number has: characters that nobody sees (NUL, escapes), and endless text."""
    if len(text) > MAX_TEXT:
        raise RecipeError(here, f"a value of {len(text):,} characters; {MAX_TEXT:,} are read at most.")
    if unseen := next((c for c in text if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"), None):
        raise RecipeError(here, f"{unseen!a} is a character that cannot be seen. Leave it out.")
