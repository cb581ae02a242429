"""`lowbit measure`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
import yaml

from lowbit.pipeline.cli.options import Build, Json, progress, show_json

Into = Annotated[Path, typer.Option(help="Where the tables go; recipes in its parent know them by name.")]


def measure(into: Into = Path("recipes/targets"), build: Build = Path("build"), as_json: Json = False) -> None:
    """Measure how fast each width is here.

    Tables of how long a product takes, for the target: of allocate_bits.
    """
    from lowbit.pipeline import api

    files = api.measure(into, build, console=progress(as_json))
    if as_json:
        show_json({str(file): yaml.safe_load(file.read_text("utf-8")) for file in files})
