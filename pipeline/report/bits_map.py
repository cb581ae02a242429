"""Bits and block size of every weight at a glance: one row a layer, one column a kind of projection."""

from __future__ import annotations

from rich.table import Column, Table
from rich.text import Text

from lowbit.passes.graph.names import LAYER
from lowbit.pipeline.report.plain_text import plain

STYLES = {2: "white on dark_red", 3: "black on orange3", 4: "black on green3", 8: "white on blue3"}
"""Hot are few bits, cold are many."""


def bits_map(forms: dict[str, tuple[int, int]]) -> Table | None:
    """A table of bits/block by layer and kind; None where all layers are alike.

    Args:
        forms: bits and block size by the weight's name.
    """
    rows: dict[str, dict[str, tuple[int, int]]] = {}
    for name, form in forms.items():
        layer = LAYER.search(f"{name}.")
        rows.setdefault(layer.group(1) if layer else "", {})[name.rpartition(".")[2]] = form
    layers = [row for number, row in rows.items() if number]
    if all(row == layers[0] for row in layers):
        return None
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    heads = [Column(plain(kind.removesuffix("_proj"))) for kind in kinds]
    table = Table(
        "layer",
        *heads,
        title="bits/block of every weight",
        title_justify="left",
        pad_edge=False,
    )
    for number, row in sorted(rows.items(), key=lambda item: int(item[0] or 1 << 30)):
        cells = [Text(f"{row[kind][0]}/{row[kind][1]}", STYLES.get(row[kind][0], "")) if kind in row else "" for kind in kinds]
        table.add_row(number, *cells)
    return table
