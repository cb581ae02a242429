"""`lowbit check`."""

from __future__ import annotations

from lowbit.pipeline.cli.options import Folder, Json, show_json


def check(folder: Folder, as_json: Json = False) -> None:
    """Prove a finished folder again.

    The hashes of all files, and every code of both models.
    """
    from lowbit.pipeline import api

    found = api.check(folder)
    if as_json:
        show_json({"folder": folder, **found})
    else:
        print(f"{folder}: {found['files']} files unchanged, {found['weights']:,} codes equal bit for bit.")
