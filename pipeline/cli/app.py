"""All words together, and what holds for each: `-v`, `-q`, `--version`, `help`."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lowbit.pipeline.cli.options import set_verbosity

WORDS = ("quantize", "run", "plan", "check", "compare", "chat", "frontier", "sweep", "measure", "clean", "doctor", "schema")
"""Each is a module here with a function of its name."""
ANYWHERE = frozenset({"-v", "--verbose", "-q", "--quiet"})
"""Options of every word, taken before it and after it."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _version(wanted: bool) -> None:
    if wanted:
        import lowbit

        print(f"lowbit {lowbit.__version__}")
        raise typer.Exit


@app.callback()
def common(
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Log what happens on stderr.")] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print results alone.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """From a Hugging Face checkpoint to a 4-, 3- or 2-bit model that runs, and that is proven to be the model you asked for.

    -v and -q may stand anywhere.
    """
    set_verbosity(verbose, quiet)


def _told(command: Callable[..., None]) -> Callable[..., None]:
    """The command, whose broken files and pipes typer does not take for the end of its own."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (EOFError, BrokenPipeError) as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return run


for word in WORDS:
    app.command(word)(_told(getattr(importlib.import_module(f"lowbit.pipeline.cli.{word}"), word)))


def call(arguments: list[str]) -> None:
    """Run the command line, without the name of the program."""
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:2], "--help"]
    flags = [word for word in arguments if word in ANYWHERE]
    app([*flags, *(word for word in arguments if word not in ANYWHERE)], prog_name="lowbit")
