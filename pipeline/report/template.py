"""The templates of pages, of the model card and of the card in notebooks."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import jinja2

from lowbit.pipeline.report.units import megabytes


@cache
def page_template(name: str) -> jinja2.Template:
    """A template of templates/; values are escaped in pages, not in Markdown."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")), autoescape=".html" in name,
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["megabytes"] = megabytes
    environment.filters["visible"] = visible
    return environment.get_template(name)


def visible(text: str) -> str:
    """Text on one line: breaks, tabs, and spaces at its ends as signs."""
    inner = text.strip(" ")
    before = len(text) - len(text.lstrip(" ")) if inner else len(text)
    signs = "\u2423" * before + inner + "\u2423" * (len(text) - before - len(inner))
    return signs.replace("\n", "\u23ce").replace("\t", "\u21e5").replace("\r", "\u240d")
