"""What a result is called: the name of a folder in build/, so a safe file name or none."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.errors import RecipeError

LONGEST = 100
"""Characters, and twice as many bytes: `.yaml` and more is put after a name, and file systems take 255 bytes."""
RESERVED = frozenset({"sweep", "frontier", "compare.html"})
"""What lies in build/ beside results."""


def check_name(name: str, file: Path) -> None:
    """Refuse a name that leads out of build/, hides there, or is another thing's.

    Args:
        file: the recipe that is called so, for the message.

    Raises:
        RecipeError: what is wrong with the name, and what would be right.
    """
    if (wrong := _wrong(name)) is not None:
        raise RecipeError(
            file,
            f"{name[:LONGEST]!a} cannot be the name of a result, which is that of its folder: {wrong}. Call the recipe by "
            f"letters, digits, dots, dashes and underscores, {LONGEST} at most.",
        )


def _wrong(name: str) -> str | None:
    if not name.strip("."):
        return "it is empty, or nothing but dots"
    if name.startswith((".", "-", "~")):
        return f"it begins with '{name[0]}'"
    if name != name.strip():
        return "it begins or ends with a space"
    if "/" in name or "\\" in name or not name.isprintable():
        return "it has a slash, or a character that cannot be seen"
    if len(name) > LONGEST or len(name.encode()) > 2 * LONGEST:
        return f"it has {len(name)} characters"
    return f"build/{name} is something else's place" if name.lower() in RESERVED else None
