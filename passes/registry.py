"""The folder is the registry: a name in a recipe is a module, and the module holds one class."""

from __future__ import annotations

import difflib
import importlib
import json
import pkgutil
from types import ModuleType
from typing import Annotated, Any, TypeVar

from pydantic import BeforeValidator, PlainSerializer, SerializeAsAny, ValidationError, ValidationInfo

import lowbit.passes.methods as methods  # not from: the package asks this module for its names
from lowbit import passes
from lowbit.passes.base import Pass, first_mistake, option_mistake
from lowbit.passes.quant.method import Method
from lowbit.passes.trust import import_trusted

T = TypeVar("T")


def names_in(package: ModuleType) -> list[str]:
    """The words of a package, sorted: its modules but `base`, `registry` and `trust`; packages within it are no words."""
    found = pkgutil.iter_modules(package.__path__)
    return sorted(m.name for m in found if not m.ispkg and m.name not in ("base", "registry", "trust"))


def did_you_mean(word: str, known: list[str]) -> str:
    """A closing sentence for an unknown word: the nearest known one, or all of them."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"Known: {', '.join(known)}."


def find_pass(name: str) -> type[Pass]:
    """The pass of module `passes/<name>.py`, or of a plug-in module given by its dotted name.

    Raises:
        KeyError: with a sentence, when there is no such module or it holds no pass.
    """
    return _find(name, passes, Pass, "pass")


def find_method(name: str) -> type[Method]:
    """The method of module `passes/methods/<name>.py`, or of a dotted plug-in module; see `find_pass`."""
    return _find(name, methods, Method, "method")


def _find(name: str, package: ModuleType, kind: type[T], word: str) -> type[T]:
    known = names_in(package)
    dotted = name if "." in name else f"{package.__name__}.{name}"
    if "." not in name and name not in known:
        raise KeyError(f"there is no {word} '{name}'. {did_you_mean(name, known)}")
    return class_in(dotted, kind, word)


def class_in(dotted: str, kind: type[T], word: str) -> type[T]:
    """The class of a kind that a module defines: `word` is what the kind is called in sentences.

    Raises:
        KeyError: with a sentence, when there is no such module, it is not trusted, or it does not define exactly one.
    """
    if not all(part.isidentifier() for part in dotted.split(".")):
        raise KeyError(
            f"'{dotted}' cannot be the name of a {word}: use letters, digits and underscores, with dots between them for a "
            "module of your own."
        )
    module = import_trusted(dotted, word)
    own = classes_in(module, kind)
    if len(own) != 1:
        raise KeyError(f"module '{dotted}' must define one {word}, it defines {len(own)}")
    return own[0]


def classes_in(module: ModuleType, kind: type[T]) -> list[type[T]]:
    """The classes of a kind that a module defines itself."""
    return [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, kind) and c.__module__ == module.__name__]


def word_of(options: Pass | Method) -> str:
    """What a recipe calls a pass or a method: the name of its file here, the dotted name of a plug-in's module."""
    package, _, name = type(options).__module__.rpartition(".")
    return name if package in (passes.__name__, methods.__name__) else f"{package}.{name}"


def class_called(name: str, package: ModuleType) -> type[Pass] | type[Method]:
    """The class `QuantizeMatmul` of the file `quantize_matmul.py` of a package.

    Raises:
        AttributeError: there is no such file.
    """
    for word in names_in(package):
        if class_name(word) == name:
            found: type[Pass] | type[Method] = getattr(importlib.import_module(f"{package.__name__}.{word}"), name)
            return found
    raise AttributeError(f"module '{package.__name__}' has no attribute '{name}'", name=name, obj=package)


def class_name(word: str) -> str:
    """What the class of a file is called: `QuantizeMatmul` for `quantize_matmul`."""
    return "".join(part.capitalize() for part in word.split("_"))


def _parse(value: Any, info: ValidationInfo) -> Any:
    """A method from what stands for it: itself, its name, or its name with its options."""
    if isinstance(value, Method):
        return value
    name, options = next(iter(value.items())) if isinstance(value, dict) and len(value) == 1 else (value, None)
    if not isinstance(name, str) or not isinstance(options, dict | None):
        raise ValueError("a method is a name such as rtn, or one name with its options: {hqq: {iterations: 30}}")
    try:
        kind = find_method(name)
    except KeyError as error:
        raise ValueError(error.args[0]) from None
    if info.mode == "python":
        return kind(**(options or {}))
    try:
        return kind.model_validate_json(json.dumps(options or {}))
    except ValidationError as errors:
        raise ValueError(f"{name}: {option_mistake(first_mistake(errors), kind)}") from None


def _as_written(method: Method) -> Any:
    options = method.model_dump(exclude_defaults=True)
    return {word_of(method): options} if options else word_of(method)


MethodChoice = Annotated[SerializeAsAny[Method], BeforeValidator(_parse), PlainSerializer(_as_written)]
