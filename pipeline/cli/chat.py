"""`lowbit chat`."""

from __future__ import annotations

import signal
from typing import Annotated

import typer
from rich.console import Console

from lowbit.pipeline.cli.options import Folder, Plugins

Runtime = Annotated[str | None, typer.Option(help="mnn, genai or onnx; by default the first that is there.")]
Prompt = Annotated[str | None, typer.Option(help="Answer this, and end.")]


def chat(folder: Folder, runtime: Runtime = None, prompt: Prompt = None, plugins: Plugins = None) -> None:
    """Talk to a finished result."""
    from lowbit.pipeline import api

    api.trust_plugins(*plugins or ())
    signal.signal(signal.SIGINT, signal.default_int_handler)  # Ctrl-C ends an answer, not the chat
    opened = api.chat(folder, runtime=runtime)
    if prompt is None:
        api.talk(opened, Console())
    else:
        api.answer(opened, prompt, Console())
