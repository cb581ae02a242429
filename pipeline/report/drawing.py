"""How pictures are drawn: matplotlib figures as SVG for pages and PNG for files, with the same colors throughout."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

STYLE = {"svg.hashsalt": "lowbit", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9.0}
"""Text stays text, and the same figure has the same bytes."""
INK, BLUE, ORANGE = "#777777", "#2f7ed8", "#e07b39"
"""Legible on white and on black."""


def new_figure(width: float = 6.4, height: float = 3.6) -> Figure:
    """An empty figure without a background, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    return figure


def quiet(figure: Figure) -> None:
    """Axes in gray, no box, no background: for light and dark pages."""
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(which="both", colors=INK)
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set_color(INK)
        for side, spine in axes.spines.items():
            spine.set_color(INK)
            spine.set_visible(side in ("left", "bottom"))


def svg(figure: Figure) -> str:
    """The figure as an element for a page, without XML's head."""
    stream = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def save(figure: Figure, path: Path) -> None:
    """Write `path`.svg and `path`.png (on white)."""
    with rc_context(STYLE):
        figure.savefig(path.with_suffix(".svg"), metadata={"Date": None, "Creator": None})
        figure.savefig(path.with_suffix(".png"), dpi=144, facecolor="white", metadata={"Software": None})
