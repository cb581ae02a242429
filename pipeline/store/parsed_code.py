"""A module's source -> its definitions as canonical text, with the names that each uses: what digests are taken of."""

from __future__ import annotations

import ast
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Definition = tuple[str, str]
"""A module and a name in it; the empty name stands for what the module does when it is imported."""


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
def parsed(name: str) -> Parsed | None:
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
