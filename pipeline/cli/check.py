"""`lowbit check`."""

from __future__ import annotations

from typing import Annotated

import typer

from lowbit.pipeline.cli.options import Folder, Json, ModelFolder, Plugins, progress, show_json

FromSource = Annotated[
    bool,
    typer.Option(
        "--from-source",
        help="Make it again from the checkpoint, recalling nothing, and compare every file of the models, to the byte. Takes "
        "about as long as the run did, and as much disk, in $TMPDIR.",
    ),
]


def check(
    folder: Folder, from_source: FromSource = False, model: ModelFolder = None, plugins: Plugins = None, as_json: Json = False
) -> None:
    """Prove a finished folder again.

    The manifest's seal, the hash of every file, what is said of sizes and weights, and every code of every engine.
    """
    from lowbit.pipeline import api

    api.trust_plugins(*plugins or ())
    found = api.check(folder, from_source=from_source, model=model, console=progress(as_json))
    if as_json:
        show_json({"folder": folder, **found})
    else:
        print(f"{folder}: {found['files']} files unchanged, {found['weights']:,} codes equal bit for bit.")
        if from_source:
            print(f"{folder}: made again from the checkpoint, every file of the models is the same.")
