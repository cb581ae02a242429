"""`lowbit schema`."""

from __future__ import annotations

from lowbit.pipeline.cli.options import show_json


def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from lowbit.pipeline import api

    show_json(api.schema())
