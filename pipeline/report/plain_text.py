"""Any text -> text that a terminal shows as it is: names of files, layers and recipes come from strangers."""

from __future__ import annotations

from rich.markup import escape
from rich.text import Text

from lowbit.pipeline.errors import visible


def plain(text: str) -> Text:
    """Text without markup (`[/b]` is just that), its control characters written out."""
    return Text(visible(text))


def plain_title(text: str) -> str:
    """The same for the title of a table, which gets its style only as a string."""
    return escape(visible(text))
