"""`lowbit compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.pipeline.cli.options import Json, show, show_json

Folders = Annotated[list[Path], typer.Argument(help="Finished folders, build/<recipe>.")]
Page = Annotated[Path, typer.Option(help="Where the page goes.")]


def compare(folders: Folders, into: Page = Path("build/compare.html"), as_json: Json = False) -> None:
    """Show finished results side by side, here and on a page."""
    from lowbit.pipeline import api

    found = api.compare(*folders, into=into)
    if as_json:
        show_json(found.figures())
    else:
        show(found.table(), f"  {found.page}")
