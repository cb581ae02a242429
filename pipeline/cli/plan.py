"""`lowbit plan`."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.cli.options import Build, Json, ModelFolder, Plugins, RecipeName, show, show_json


def plan(
    recipe: RecipeName, model: ModelFolder = None, build: Build = Path("build"), plugins: Plugins = None, as_json: Json = False
) -> None:
    """Say what a run would do; touches nothing."""
    from lowbit.pipeline import api

    api.trust_plugins(*plugins or ())
    found = api.plan(recipe, build, model=model)
    if as_json:
        show_json(api.plan_figures(found))
    else:
        show(*api.plan_tables(found))
