"""`lowbit compare`: finished results side by side, in the terminal and on a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from lowbit.pipeline.report.figures import compare_figure, svg
from lowbit.pipeline.report.html import page_template
from lowbit.pipeline.report.manifest import read_manifest
from lowbit.pipeline.report.units import megabytes

COLUMNS = ("", "size", "bits", "ppl", "KL", "rtn KL", "same", "gates", "time")
"""Size of the first hand-off; stored bits per weight; perplexity; KL divergence in nats per token, and that of plain rounding;
how often the first choice is the float model's."""


def read_results(folders: list[Path]) -> list[tuple[str, dict[str, Any]]]:
    """Name and manifest of every finished result.

    Raises:
        PipelineError: one is none.
    """
    found = [(folder, read_manifest(folder)) for folder in folders]
    names = [manifest["recipe"] for _, manifest in found]
    return [(m["recipe"] if names.count(m["recipe"]) == 1 else str(folder), m) for folder, m in found]


def comparison_rows(results: list[tuple[str, dict[str, Any]]], failures: dict[str, str]) -> list[tuple[str, ...]]:
    """One row a result, in COLUMNS; failures come last, with what went wrong in place of a size."""
    return [_row(name, manifest) for name, manifest in results] + [
        (name, f"failed: {why}", *[""] * (len(COLUMNS) - 2)) for name, why in failures.items()
    ]


def comparison_table(rows: list[tuple[str, ...]]) -> Table:
    """For the terminal."""
    columns = (Column(name, no_wrap=bool(name), overflow="fold") for name in COLUMNS)
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*row)
    return table


def write_comparison(file: Path, results: list[tuple[str, dict[str, Any]]], rows: list[tuple[str, ...]]) -> None:
    """One self-contained page: the table, sizes against KL divergence, the recipes."""
    points = [
        (name, manifest["size"][f"{_first(manifest)}_bytes"] / 1e6, manifest["quality"]["onnxruntime"]["kl_divergence"])
        for name, manifest in results
        if "kl_divergence" in manifest["quality"].get("onnxruntime", {})
    ]
    picture = svg(compare_figure(points)) if points else None
    recipes = [(name, manifest["recipe_text"]) for name, manifest in results]
    file.parent.mkdir(parents=True, exist_ok=True)
    page = page_template("compare.html.j2").render(columns=COLUMNS, rows=rows, picture=picture, recipes=recipes)
    file.write_text(page, "utf-8")


def _first(manifest: dict[str, Any]) -> str:
    """The folder whose size counts: that of the first hand-off, or the ONNX model."""
    return next(iter(manifest["hand_offs"]), "onnx")


def _row(name: str, manifest: dict[str, Any]) -> tuple[str, ...]:
    quality, gates = manifest["quality"].get("onnxruntime", {}), manifest["gates"]
    folder = _first(manifest)
    size = megabytes(manifest["size"][f"{folder}_bytes"])
    missed = sum(not gate["passed"] for gate in gates)
    said = f"missed {missed}/{len(gates)}" if missed else "passed" if gates else ""
    seconds = f"{sum(step['seconds'] for step in manifest['steps']):.0f} s"
    if "kl_divergence" not in quality:
        return name, size, f"{manifest['size']['bits_per_weight']:.3f}", "", "", "", "", said, seconds
    plain = manifest["quality"].get("plain_rtn")
    return (
        name, size, f"{manifest['size']['bits_per_weight']:.3f}", f"{quality['perplexity']:.2f}",
        f"{quality['kl_divergence']:.4f}", "" if plain is None else f"{plain['kl_divergence']:.4f}",
        f"{quality['top1_agreement']:.1%}", said, seconds,
    )  # fmt: skip
