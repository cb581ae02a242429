"""Classes and functions -> a digest of the source that they run: every definition of this project that they reach.

It is taken of parsed code. Comments, docstrings, annotations of functions and the sentences of raised errors do not count: a
reworded message runs nothing again. Names are followed through imports, those within functions too, so a kernel in another
module counts and its neighbors do not. A method called on a value whose class is named nowhere on the way is not seen: make
such a class a root.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from types import ModuleType
from typing import Any

from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.parsed_code import Definition, Parsed, Source, parsed

PROJECT = "lowbit"
Root = Callable[..., Any] | ModuleType


@cache
def source_digest(*roots: Root) -> str:
    """SHA-256 over every definition that `roots` (classes, functions, whole modules) reach, in hex.

    Of a plug-in's module, its package or, for a single file, the files beside it belong to the project as well.

    Raises:
        PipelineError: the source of a root cannot be read, so nobody could tell when it changes.
    """
    return digest(reached(*roots))


def reached(*roots: Root) -> dict[str, str]:
    """The parsed code of every definition that `roots` reach, by `module.name`."""
    homes = frozenset({PROJECT} | {_module_name(root) for root in roots})
    waiting = [definition for root in roots for definition in _definitions(root)]
    code: dict[Definition, str] = {}
    while waiting:
        here = waiting.pop()
        module = parsed(here[0]) if _belongs(here[0], homes) else None
        if here in code or module is None:
            continue
        if (source := module.definitions.get(here[1])) is None:
            if (target := module.imports.get(here[1])) is not None:
                waiting.append(target)
            continue
        code[here] = source.code
        waiting += [(here[0], ""), *_followed(module, source, homes)]
    return {".".join(key): code[key] for key in sorted(code)}


def _followed(module: Parsed, source: Source, homes: frozenset[str]) -> Iterator[Definition]:
    """What the names in a definition stand for."""
    imports = module.imports | source.imports
    for name in source.names:
        first, _, attribute = name.partition(".")
        if first not in imports:
            yield module.name, first
            continue
        target, found = imports[first]
        if not _belongs(target, homes):  # to look into another package would import it
            continue
        inner = target if found == "*" else f"{target}.{found}"
        if found != "*" and parsed(inner) is None:
            yield target, found
        elif attribute:  # a name that is looked up in a module
            yield inner, attribute


def _definitions(root: Root) -> list[Definition]:
    module = parsed(_module_name(root))
    names = [] if module is None else list(module.definitions)
    wanted = names if isinstance(root, ModuleType) else [root.__qualname__.partition(".")[0]]
    if not names or not set(wanted) <= set(names):
        raise PipelineError(
            f"the source of {root.__name__} in '{_module_name(root)}' cannot be read, so a change to it would not be noticed. "
            "Define it in a module of its own and import it from there."
        )
    return [(_module_name(root), name) for name in wanted]


def _module_name(root: Root) -> str:
    return root.__name__ if isinstance(root, ModuleType) else root.__module__


def _belongs(name: str, homes: frozenset[str]) -> bool:
    """Whether a module is of this project, or of the package or beside the file of one of the roots."""
    if name.partition(".")[0] in {home.partition(".")[0] for home in homes}:
        return True
    files = {found.file.parent for home in homes if "." not in home and (found := parsed(home)) is not None}
    return "." not in name and bool(files) and (found := parsed(name)) is not None and found.file.parent in files
