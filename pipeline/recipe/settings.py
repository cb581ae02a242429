"""The user's own settings file: for now, the folders whose plug-ins are trusted."""

from __future__ import annotations

import os
from pathlib import Path

from lowbit.passes.trust import trust_folders
from lowbit.pipeline.errors import RecipeError
from lowbit.pipeline.recipe.yaml_reader import read

TRUST = "trust_plugins"


def settings_file() -> Path:
    """`lowbit/settings.yaml` in the user's folder for configuration, `~/.config` by default."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser() / "lowbit" / "settings.yaml"


def trust_by_settings() -> None:
    """Trust the plug-ins of the folders that the settings file lists; without such a file, of none.

    Raises:
        RecipeError: file:line:column and what would be right.
    """
    file = settings_file()
    if not file.is_file():
        return
    document = read(file)
    settings = {} if document.value is None else document.value
    listed = settings.get(TRUST, []) if isinstance(settings, dict) and set(settings) <= {TRUST} else None
    if not isinstance(listed, list) or not all(isinstance(folder, str) for folder in listed):
        raise RecipeError(document.position(()), f"settings are a list of folders: {TRUST}: [~/my-plugins].")
    for i, folder in enumerate(listed):
        try:
            trust_folders(file.parent / Path(folder).expanduser())
        except (OSError, RuntimeError, ValueError) as error:
            raise RecipeError(document.position((TRUST, i)), f"{folder!r} cannot be trusted: {error}") from error
