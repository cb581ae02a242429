"""What a hand-off's `target:` may be: a word of a room of pipeline/convert, or the dotted name of a module of one's own.

Rooms are found by name when a recipe is read: a recipe stands below the engines and imports none of them.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from typing import Any

from lowbit.passes.registry import class_in, classes_in
from lowbit.pipeline.recipe.sections import Convert
from lowbit.pipeline.recipe.settings import trust_by_settings

ROOMS = "lowbit.pipeline.convert"
DEFAULT = "mnn-llm"
"""The target of a section that names none."""


def target_names() -> list[str]:
    """The targets of all rooms, the default one first."""
    return sorted(_rooms(), key=lambda word: (word != DEFAULT, word))


def find_options(target: Any) -> type[Convert]:
    """The options of a target, given by its word or by the dotted name of a plug-in module.

    Raises:
        KeyError: with a sentence, when there is no such target, or it is not trusted.
    """
    if not isinstance(target, str) or ("." not in target and target not in _rooms()):
        known = target_names()
        near = difflib.get_close_matches(str(target), known, n=1)
        sentence = f"target is {target!r}; expected {', '.join(map(repr, known[:-1]))} or {known[-1]!r}."
        raise KeyError(f"{sentence} Did you mean '{near[0]}'?" if near else sentence)
    if target in _rooms():
        return _rooms()[target]
    trust_by_settings()
    return class_in(target, Convert, "target")


def targets_with(option: str) -> list[str]:
    """The targets that have an option of this name."""
    return [word for word in target_names() if option in find_options(word).model_fields]


@cache
def _rooms() -> dict[str, type[Convert]]:
    """Options by target: each room says in its module `options` which targets it makes."""
    package = importlib.import_module(ROOMS)
    rooms = [importlib.import_module(f"{ROOMS}.{m.name}.options") for m in pkgutil.iter_modules(package.__path__) if m.ispkg]
    return {str(kind.model_fields["target"].default): kind for room in rooms for kind in classes_in(room, Convert)}
