"""Names of weights as in the checkpoint, and globs on them."""

from __future__ import annotations

import difflib
import re
from fnmatch import fnmatchcase

from lowbit.passes.base import PassError

LAYER = re.compile(r"layers\.(\d+)[./]")
"""A decoder layer in the name of a node or a weight."""


def layer_name(weight: str, node: str, shared: bool) -> str:
    """The checkpoint's name of the layer that multiplies by `weight`: `model.layers.0.mlp.down_proj`.

    A weight that is `shared` with the embedding (tied) is named after the node instead, whose scope
    says which layer reads it: `/lm_head/MatMul` -> `lm_head`.
    """
    if shared:
        scope = node.strip("/").rpartition("/")[0]
        return scope.replace("/", ".") or node
    return weight.removesuffix(".weight")


def select(names: list[str], include: tuple[str, ...], exclude: tuple[str, ...], also: set[str]) -> dict[str, str]:
    """Which of `names` a pass leaves alone, with the reason; all others are to be rewritten.

    Args:
        names: what can be rewritten.
        include, exclude: globs (`*`, `?`, `[...]`), case-sensitive, on whole names.
        also: names that are real but no longer on offer; a pattern may match only those.

    Raises:
        PassError: a pattern matches nothing at all; names the closest real ones.
    """
    known = [*names, *sorted(also)]
    for field, patterns in (("include", include), ("exclude", exclude)):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise PassError(f"{field}: '{pattern}' matches no weight. {_nearest(pattern, known)}")
    skipped = {}
    for name in names:
        dropped = next((p for p in exclude if fnmatchcase(name, p)), None)
        if dropped is not None:
            skipped[name] = f"excluded by '{dropped}'"
        elif not any(fnmatchcase(name, p) for p in include):
            skipped[name] = "not in include"
    return skipped


def _nearest(pattern: str, names: list[str]) -> str:
    if not names:
        return "The graph has no weight that this pass handles."
    word = pattern.strip("*.")
    # a glob is nearest to a name by its last part, the kind of layer
    kinds = {name.rpartition(".")[2]: name for name in reversed(names)}
    near = difflib.get_close_matches(word.rpartition(".")[2], list(kinds), n=3, cutoff=0.5)
    close = [kinds[kind] for kind in near] or difflib.get_close_matches(word, names, n=3, cutoff=0.3) or names[:3]
    return "The closest real names: " + ", ".join(f"'{name}'" for name in close) + "."
