"""Classes and functions -> a digest of the source that they run: every definition of this project that they reach.

It is taken of parsed code. Comments, docstrings, annotations of functions and the sentences of raised errors do not count: a
reworded message runs nothing again. Names are followed through imports, those within functions too, so a kernel in another
module counts and its neighbors do not. A method called on a value whose class is named nowhere on the way is not seen: make
such a class a root.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from lowbit.pipeline.store.digests import digest

PROJECT = "lowbit"
Definition = tuple[str, str]
"""A module and a name in it; the empty name stands for what the module does when it is imported."""
Root = Callable[..., Any] | ModuleType


@cache
def source_digest(*roots: Root) -> str:
    """SHA-256 over every definition that `roots` (classes, functions, whole modules) reach, in hex.

    Of a plug-in's module, its package or, for a single file, the files beside it belong to the project as well.
    """
    return digest(reached(*roots))


def reached(*roots: Root) -> dict[str, str]:
    """The parsed code of every definition that `roots` reach, by `module.name`."""
    homes = frozenset({PROJECT} | {_module_name(root) for root in roots})
    waiting = [definition for root in roots for definition in _definitions(root)]
    code: dict[Definition, str] = {}
    while waiting:
        here = waiting.pop()
        module = _parsed(here[0]) if _belongs(here[0], homes) else None
        if here in code or module is None:
            continue
        if (source := module.definitions.get(here[1])) is None:
            if (target := module.imports.get(here[1])) is not None:
                waiting.append(target)
            continue
        code[here] = source.code
        waiting += [(here[0], ""), *_followed(module, source, homes)]
    return {".".join(key): code[key] for key in sorted(code)}


@dataclass(frozen=True)
class Source:
    """One definition: its code as a canonical text, the names that it uses, and what it imports itself.

    Attributes:
        names: plain names, and `name.attribute` for what is looked up in one.
    """

    code: str
    names: frozenset[str]
    imports: dict[str, Definition]


@dataclass(frozen=True)
class Parsed:
    """A module of Python, taken apart."""

    name: str
    file: Path
    definitions: dict[str, Source] = field(default_factory=dict)
    imports: dict[str, Definition] = field(default_factory=dict)


@cache
def _parsed(name: str) -> Parsed | None:
    """The module of a name; None if it is not one that is written in Python."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):  # `from package import name`, where name is no module
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    file = Path(spec.origin)
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    tree = ast.fix_missing_locations(_Plain().visit(ast.parse(file.read_text("utf-8"))))
    module = Parsed(name, file)
    statements: dict[str, list[ast.stmt]] = {}
    for statement in tree.body:
        if isinstance(statement, ast.Import | ast.ImportFrom):
            module.imports.update(_imports(statement, package))
        else:
            for target in _targets(statement):
                statements.setdefault(target, []).append(statement)
    module.definitions.update({target: _source(found, package) for target, found in statements.items()})
    return module


def _source(statements: list[ast.stmt], package: str) -> Source:
    nodes = [node for statement in statements for node in ast.walk(statement)]
    imports: dict[str, Definition] = {}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports |= _imports(node, package)
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    names |= {f"{n.value.id}.{n.attr}" for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name)}
    return Source("\n".join(ast.unparse(statement) for statement in statements), frozenset(names), imports)


def _targets(statement: ast.stmt) -> list[str]:
    """The names that a statement defines; the empty one if it only does something."""
    match statement:
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Assign(targets=[*targets]):
            names = [node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name)]
            return names if all(isinstance(target, ast.Name | ast.Tuple) for target in targets) else [""]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
    return [""]


def _imports(statement: ast.Import | ast.ImportFrom, package: str) -> dict[str, Definition]:
    if isinstance(statement, ast.Import):
        return {alias.asname or alias.name: (alias.name, "*") for alias in statement.names}
    module = statement.module or ""
    if statement.level:
        module = importlib.util.resolve_name("." * statement.level + module, package)
    return {alias.asname or alias.name: (module, alias.name) for alias in statement.names}


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
        if found != "*" and _parsed(inner) is None:
            yield target, found
        elif attribute:  # a name that is looked up in a module
            yield inner, attribute


def _definitions(root: Root) -> list[Definition]:
    name = _module_name(root)
    if isinstance(root, ModuleType):
        module = _parsed(name)
        return [(name, defined) for defined in module.definitions] if module is not None else []
    return [(name, root.__qualname__.partition(".")[0])]


def _module_name(root: Root) -> str:
    return root.__name__ if isinstance(root, ModuleType) else root.__module__


def _belongs(name: str, homes: frozenset[str]) -> bool:
    """Whether a module is of this project, or of the package or beside the file of one of the roots."""
    if name.partition(".")[0] in {home.partition(".")[0] for home in homes}:
        return True
    files = {found.file.parent for home in homes if "." not in home and (found := _parsed(home)) is not None}
    return "." not in name and bool(files) and (found := _parsed(name)) is not None and found.file.parent in files


class _Plain(ast.NodeTransformer):
    """Takes away what cannot change a result: bare strings, annotations of functions, the sentences of errors."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            return None
        return self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        kind = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        return ast.Raise(None if kind is None else ast.Constant(ast.unparse(kind)), None)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        for argument in ast.walk(node.args):
            if isinstance(argument, ast.arg):
                argument.annotation = None
        node.body = [_without_annotation(statement) for statement in node.body]
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        self.generic_visit(node)
        node.body = node.body or [ast.Pass()]
        return node


def _without_annotation(statement: ast.stmt) -> ast.stmt:
    if isinstance(statement, ast.AnnAssign):
        return ast.Assign([statement.target], statement.value) if statement.value is not None else ast.Pass()
    return statement
