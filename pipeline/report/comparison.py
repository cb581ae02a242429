"""`lowbit compare`: finished results side by side, in the terminal and on a page."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from lowbit.pipeline.report.charts import compare_figure
from lowbit.pipeline.report.drawing import svg
from lowbit.pipeline.report.manifest import Manifest, read_manifest
from lowbit.pipeline.report.plain_text import plain
from lowbit.pipeline.report.template import page_template
from lowbit.pipeline.report.units import megabytes
from lowbit.pipeline.store.store import writing

COLUMNS = ("", "size", "bits", "ppl", "KL", "rtn KL", "same", "gates", "time")
"""Size of the first hand-off; stored bits per weight; perplexity; KL divergence in nats per token, and that of plain rounding;
how often the first choice is the float model's."""
Result = tuple[str, Manifest]
"""What a result is called here, and its manifest."""


def read_results(folders: list[Path]) -> list[Result]:
    """Every finished result.

    Raises:
        PipelineError: one is none.
    """
    manifests = [read_manifest(folder) for folder in folders]
    names = [manifest.recipe for manifest in manifests]
    return [
        (manifest.recipe if names.count(manifest.recipe) == 1 else str(folder), manifest)
        for folder, manifest in zip(folders, manifests, strict=True)
    ]


def comparison_rows(results: list[Result], failures: dict[str, str]) -> list[tuple[str, ...]]:
    """One row a result, in COLUMNS; failures come last, with what went wrong in place of a size."""
    return [_row(name, manifest) for name, manifest in results] + [
        (name, f"failed: {why}", *[""] * (len(COLUMNS) - 2)) for name, why in failures.items()
    ]


def comparison_table(rows: list[tuple[str, ...]]) -> Table:
    """For the terminal."""
    columns = (Column(name, no_wrap=bool(name), overflow="fold") for name in COLUMNS)
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for row in rows:
        table.add_row(*map(plain, row))
    return table


def write_comparison(file: Path, results: list[Result], rows: list[tuple[str, ...]]) -> None:
    """One self-contained page: the table, sizes against KL divergence, the recipes."""
    points = [
        (name, _size(manifest) / 1e6, manifest.quality.kl_divergence)
        for name, manifest in results
        if manifest.quality.kl_divergence is not None
    ]
    picture = svg(compare_figure(points)) if points else None
    recipes = [(name, manifest.recipe_text) for name, manifest in results]
    page = page_template("compare.html.j2").render(columns=COLUMNS, rows=rows, picture=picture, recipes=recipes)
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(page, "utf-8")


def _size(manifest: Manifest) -> int:
    """Bytes of the folder that counts: that of the first hand-off, or the ONNX model."""
    return manifest.size.of(next(iter(manifest.hand_offs), "onnx"))


def _row(name: str, manifest: Manifest) -> tuple[str, ...]:
    text, plain = manifest.quality.text, manifest.quality.plain_rtn
    gates = f"missed {len(manifest.missed)}/{len(manifest.gates)}" if manifest.missed else "passed" if manifest.gates else ""
    quality = ("",) * 4
    if text is not None:
        plain_kl = "" if plain is None else f"{plain.kl_divergence:.4f}"
        quality = (f"{text.perplexity:.2f}", f"{text.kl_divergence:.4f}", plain_kl, f"{text.top1_agreement:.1%}")
    size, bits = megabytes(_size(manifest)), f"{manifest.size.bits_per_weight:.3f}"
    return name, size, bits, *quality, gates, f"{manifest.seconds:.0f} s"
