"""`lowbit check`."""

from __future__ import annotations

from lowbit.pipeline.cli.options import Folder, Json, Plugins, show_json


def check(folder: Folder, plugins: Plugins = None, as_json: Json = False) -> None:
    """Prove a finished folder again.

    The manifest's seal, the hash of every file, what is said of sizes and weights, and every code of every engine.
    """
    from lowbit.pipeline import api

    api.trust_plugins(*plugins or ())
    found = api.check(folder)
    if as_json:
        show_json({"folder": folder, **found})
    else:
        print(f"{folder}: {found['files']} files unchanged, {found['weights']:,} codes equal bit for bit.")
