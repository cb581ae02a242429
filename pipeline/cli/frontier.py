"""`lowbit frontier`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lowbit.pipeline.cli.options import Build, Json, ModelFolder, Plugins, RecipeName, progress, show, show_json

Points = Annotated[int, typer.Option(min=0, help="At how many sizes the KL divergence is measured.")]


def frontier(
    recipe: RecipeName,
    model: ModelFolder = None,
    build: Build = Path("build"),
    points: Points = 5,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Find how good the model can be at every size.

    For a recipe with allocate_bits; a table and a picture.
    """
    from lowbit.pipeline import api

    api.trust_plugins(*plugins or ())
    folder = api.frontier(recipe, build, model=model, points=points, console=progress(as_json))
    if as_json:
        show_json({"folder": folder, **json.loads((folder / "frontier.json").read_text("utf-8"))})
    else:
        show(f"  {folder}/frontier.svg\n  {folder}/frontier.png\n  {folder}/frontier.json")
