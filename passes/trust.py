"""A dotted name -> its module, if the user said that its code may run. A recipe, which may be a stranger's, cannot say so."""

from __future__ import annotations

import importlib
import importlib.util
import site
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType

GROUP = "lowbit.plugins"
"""Entry points by which an installed package says that its top-level module has passes, methods or targets."""
OWN = __name__.partition(".")[0]
_folders: dict[Path, None] = {}
_used: set[str] = set()
"""Dotted names of the plug-ins that were asked for, and found."""


def trust_folders(*folders: Path) -> None:
    """Let names of passes, methods and targets import modules from `folders`, which come last in Python's path.

    Raises:
        NotADirectoryError: one is no folder.
    """
    for folder in folders:
        if not folder.is_dir():
            raise NotADirectoryError(f"{folder}: is no folder, so no plug-in can lie in it.")
        _folders[folder.resolve()] = None
        if str(folder.resolve()) not in sys.path:
            sys.path.append(str(folder.resolve()))


def trusted_folders() -> tuple[Path, ...]:
    """Those named so far, whole paths; other processes and hosts are told of them."""
    return tuple(_folders)


def import_trusted(dotted: str, word: str) -> ModuleType:
    """The module of a dotted name: one that the program has imported, one of lowbit's own, or one that is trusted.

    Args:
        word: what it should hold, for sentences: a pass, method or target.

    Raises:
        KeyError: with a sentence: there is no such module, it is not trusted, or its code failed.
    """
    top = dotted.partition(".")[0]
    if (module := sys.modules.get(dotted)) is not None:
        if top != OWN:
            _used.add(dotted)
        return module
    places = _places(top)
    if top in sys.stdlib_module_names:
        raise KeyError(f"module '{dotted}' must define one {word}, it defines 0: it is Python's own")
    if not places:
        raise KeyError(f"there is no {word} module '{dotted}': No module named '{top}'")
    if top != OWN and not all(_is_trusted(top, place) for place in places):
        raise KeyError(
            f"'{dotted}' is code of {places[0]}, which is not trusted, and a recipe cannot make it so. If you trust it, give "
            f"its folder with --plugins {places[0]} (in Python: lowbit.trust_plugins, or import it), or write it under "
            "trust_plugins: in lowbit/settings.yaml of your own settings."
        )
    if top != OWN:
        _used.add(dotted)
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        raise KeyError(f"there is no {word} module '{dotted}': {error.msg}") from error
    except (Exception, SystemExit) as error:
        if top == OWN:
            raise
        raise KeyError(f"the {word} module '{dotted}' cannot be imported: {type(error).__name__}: {error}") from error


def plug_in_of(module: str) -> str | None:
    """The dotted name of the plug-in that a module is, or that it lies beside."""
    if module in _used:
        return module
    package = module.rpartition(".")[0]
    return next((name for name in sorted(_used) if name.rpartition(".")[0] == package), None)


def _places(top: str) -> list[Path]:
    """The folders in which Python would find a top-level module; looking runs none of its code."""
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # of what was imported without one, such as a script
        return []
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(place).parent.resolve() for place in spec.submodule_search_locations]
    return [Path(spec.origin or top).parent.resolve()]


def _is_trusted(top: str, place: Path) -> bool:
    return place in _folders or (top in _installed() and place != Path.cwd())


@cache
def _installed() -> frozenset[str]:
    """Top-level modules that installed packages name; the working directory's are not looked at."""
    found = metadata.distributions(path=[*site.getsitepackages(), site.getusersitepackages()])
    points = (point for distribution in found for point in distribution.entry_points if point.group == GROUP)
    return frozenset(point.value.partition(":")[0].partition(".")[0].strip() for point in points)
