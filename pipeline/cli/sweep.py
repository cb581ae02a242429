"""`lowbit sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.pipeline.cli.options import Build, Json, ModelFolder, Plugins, RecipeName, StorePlace, progress, show, show_json

Vary = Annotated[list[str], typer.Option(help="An option and its values: passes.quantize_matmul.bits=4,3,2")]
On = Annotated[str | None, typer.Option(help="A Ray cluster, ray://HOST:PORT; its nodes share --build.")]


def sweep(
    recipe: RecipeName,
    vary: Vary,
    model: ModelFolder = None,
    build: Build = Path("build"),
    on: On = None,
    store: StorePlace = None,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Run every combination of some options and compare them."""
    from lowbit.pipeline import api

    api.trust_plugins(*plugins or ())
    found = api.sweep(recipe, vary, build, model=model, on=on, store=store, console=progress(as_json))
    if as_json:
        show_json(found.figures())
    else:
        show(found.table(), f"  {found.page}")
