"""`lowbit run`."""

from __future__ import annotations

from pathlib import Path

from lowbit.pipeline.cli.options import Build, Json, ModelFolder, Plugins, RecipeName, StorePlace, progress, show, show_json


def run(
    recipe: RecipeName,
    model: ModelFolder = None,
    build: Build = Path("build"),
    store: StorePlace = None,
    plugins: Plugins = None,
    as_json: Json = False,
) -> None:
    """Run a recipe: checkpoint to ONNX to low bits to MNN, checked."""
    from lowbit.pipeline import api

    api.trust_plugins(*plugins or ())
    console = progress(as_json)
    result = api.run(recipe, build, model=model, store=store, console=console)
    if as_json:
        show_json(result.figures())
    elif console.quiet:
        show(str(result.folder))
