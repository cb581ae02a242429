"""Options that several words share, and where progress and figures go."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.text import Text

from lowbit.pipeline.report.plain_text import plain

RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of one in recipes/ or of one that comes along.")]
Folder = Annotated[Path, typer.Argument(help="A finished folder, build/<recipe>.")]
ModelFolder = Annotated[Path | None, typer.Option(help="Take the checkpoint from this folder instead.")]
StorePlace = Annotated[
    str | None,
    typer.Option(
        help="Where finished steps are kept: a folder, or a URL to share them (s3://, ssh://, file://); ro: only reads."
    ),
]
Build = Annotated[Path, typer.Option(help="Where results go.")]
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugins", metavar="FOLDER", help="Trust passes, methods and targets in this folder; may be given again."),
]
Json = Annotated[bool, typer.Option("--json", help="Print figures as JSON; progress goes to stderr.")]

_quiet = False


def set_verbosity(verbose: bool, quiet: bool) -> None:
    """What `-v` and `-q` ask for: log lines on stderr, or no progress."""
    global _quiet
    _quiet = quiet
    if verbose:
        log = logging.getLogger("lowbit")
        log.setLevel(logging.DEBUG)
        log.addHandler(RichHandler(console=Console(stderr=True), show_path=False))


def progress(as_json: bool = False) -> Console:
    """Where progress goes: stdout, unless figures do."""
    return Console(stderr=as_json, quiet=_quiet)


def show(*things: Any) -> None:
    """Print tables and paths, also with `-q`: they are what was asked for."""
    for thing in things:
        thing = plain(thing) if isinstance(thing, str) else thing
        Console().print(thing, soft_wrap=isinstance(thing, Text), highlight=False, markup=False)


def show_json(value: Any) -> None:
    """Print figures as JSON."""
    print(json.dumps(value, indent=2, default=str))
