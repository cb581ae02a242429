"""What there is to see of a result: sizes against KL divergence, bytes, bits and errors of weights, KL along a window."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure

from lowbit.pipeline.report.drawing import BLUE, INK, ORANGE, new_figure, quiet


def frontier_figure(
    predicted: Iterable[tuple[float, float]],
    measured: Iterable[tuple[float, float]],
    uniform: Iterable[tuple[str, float, float]],
    unit: str,
) -> Figure:
    """Size against KL divergence: the frontier as a line, what was measured of it and uniform bits as points.

    Args:
        predicted, measured: (megabytes, KL divergence or expected loss).
        uniform: (name, megabytes, KL divergence).
        unit: of the sizes' axis.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    axes.plot(*zip(*predicted, strict=True), color=BLUE, label="chosen, predicted")
    for label, marker, color, points in (
        ("chosen, measured", "o", BLUE, list(measured)),
        ("uniform, measured", "s", ORANGE, [(x, y) for _, x, y in uniform]),
    ):
        if points:
            axes.plot(*zip(*points, strict=True), marker, color=color, label=label)
    for name, x, y in uniform:
        axes.annotate(name, (x, y), xytext=(6, 4), textcoords="offset points", color=ORANGE)
    axes.set(xlabel=unit, ylabel="KL divergence, nats per token", yscale="log")
    quiet(figure)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def bytes_figure(parts: dict[str, int]) -> Figure:
    """One stacked bar: how many bytes each kind of layer takes, largest first."""
    figure = new_figure(6.4, 1.5)
    axes, start = figure.add_subplot(), 0.0
    for number, (name, count) in enumerate(sorted(parts.items(), key=lambda part: -part[1])):
        color = colormaps["tab20"](number % 20)
        axes.barh(0, count / 1e6, left=start / 1e6, color=color, label=f"{name} {count / sum(parts.values()):.0%}")
        start += count
    axes.set(xlabel="MB", yticks=[], ylim=(-0.6, 0.6), xlim=(0, start / 1e6))
    quiet(figure)
    axes.spines["left"].set_visible(False)
    figure.legend(loc="outside upper left", ncols=5, frameon=False, labelcolor=INK, fontsize=8)
    return figure


def map_figure(
    rows: list[str], columns: list[str], values: npt.NDArray[np.float64], texts: list[list[str]], colors: str
) -> Figure:
    """A heat map, layers by projections.

    Args:
        values: float [rows, columns], NaN where there is no such weight.
        texts: what each cell says.
        colors: a color map's name.
    """
    figure = new_figure(1.2 + 0.72 * len(columns), 0.7 + 0.24 * len(rows))
    axes = figure.add_subplot()
    low, high = np.nanmin(values), np.nanmax(values)
    span = (high - low) or 1.0
    axes.imshow(values, aspect="auto", cmap=colors, vmin=low - 0.25 * span, vmax=high + 0.25 * span)
    for row, cells in enumerate(texts):
        for column, text in enumerate(cells):
            if not np.isnan(values[row, column]):
                red, green, blue, _ = colormaps[colors]((values[row, column] - low + 0.25 * span) / (1.5 * span))
                light = 0.3 * red + 0.59 * green + 0.11 * blue > 0.55
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color="black" if light else "white")
    axes.set_xticks(range(len(columns)), [column.replace("_", "\n") for column in columns])
    axes.set_yticks(range(len(rows)), rows)
    axes.xaxis.tick_top()
    quiet(figure)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0)
    return figure


def position_figure(divergence: Sequence[float], plain: Sequence[float], window: int) -> Figure:
    """KL divergence along a window, and that of plain rounding where it was measured."""
    figure = new_figure(6.4, 2.4)
    axes = figure.add_subplot()
    for name, values, color in (("plain rtn", plain, ORANGE), ("this model", divergence, BLUE)):
        if values:
            middles = (np.arange(len(values)) + 0.5) * window / len(values)
            axes.plot(middles, values, color=color, label=name, marker=".")
    axes.set(xlabel="token of the window", ylabel="KL, nats per token", ylim=(0, None), xlim=(0, window))
    quiet(figure)
    axes.legend(frameon=False, labelcolor=INK)
    return figure


def compare_figure(points: Iterable[tuple[str, float, float]]) -> Figure:
    """Size against KL divergence, a point for each result: (name, megabytes, KL). Names stand beside: points may be close."""
    figure = new_figure()
    axes = figure.add_subplot()
    for number, (name, x, y) in enumerate(points):
        axes.plot(x, y, "osD^v"[number // 10 % 5], color=colormaps["tab10"](number % 10), label=name)
    axes.margins(0.15)
    axes.set(xlabel="MB", ylabel="KL divergence, nats per token", yscale="log")
    quiet(figure)
    figure.legend(loc="outside right upper", frameon=False, labelcolor=INK, fontsize=8)
    return figure
