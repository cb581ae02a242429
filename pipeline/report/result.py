"""Finished results, for Python: folders, figures, and what notebooks show."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from rich.table import Table

from lowbit.pipeline.report.comparison import COLUMNS, comparison_rows, comparison_table, read_results, write_comparison
from lowbit.pipeline.report.html import result_card
from lowbit.pipeline.report.manifest import Manifest, read_manifest
from lowbit.pipeline.report.quality import Quality
from lowbit.pipeline.report.records import Size
from lowbit.pipeline.report.summary import closing_rows
from lowbit.pipeline.report.template import page_template

BULKY = {"weights", "steps", "files", "model", "recipe_text"}
"""Parts of the manifest that no `--json` prints: they have a line for every weight or file."""


@dataclass(frozen=True)
class Result:
    """A result that a run finished.

    Attributes:
        folder: with `onnx/`, a folder for each engine, `report.html`, `manifest.json` and the recipe.
    """

    folder: Path

    @cached_property
    def manifest(self) -> Manifest:
        """All of manifest.json: steps, weights, hashes, figures.

        Raises:
            PipelineError: no run has finished in the folder.
        """
        return read_manifest(self.folder)

    @property
    def name(self) -> str:
        """What the recipe is called."""
        return self.manifest.recipe

    @property
    def quality(self) -> Quality:
        """How far the models are from the float model, in onnxruntime and in every engine: `quality.kl_divergence`."""
        return self.manifest.quality

    @property
    def size(self) -> Size:
        """Bytes of every folder and bits per weight: `size.mnn_bytes`."""
        return self.manifest.size

    def figures(self) -> dict[str, Any]:
        """What `--json` prints: the folder, and the manifest without what it says of single weights and files."""
        return {"folder": str(self.folder), **self.manifest.model_dump(mode="json", exclude=BULKY)}

    def __str__(self) -> str:
        """Figures line by line, and where the files are."""
        rows = (f"  {name}: {figure}" for name, figure in closing_rows(self.manifest))
        return "\n".join([f"{self.name}: {self.folder}", *rows])

    def _repr_html_(self) -> str:
        """The card that Jupyter shows."""
        return result_card(self.manifest)


@dataclass(frozen=True)
class Comparison:
    """Results side by side.

    Attributes:
        results: by name.
        failures: what went wrong with those that there are no results of, by name.
        page: all of it as a page that needs no network.
    """

    results: dict[str, Result]
    failures: dict[str, str]
    page: Path

    def rows(self) -> list[tuple[str, ...]]:
        """A row for each, in the columns of `lowbit compare`."""
        return comparison_rows([(name, result.manifest) for name, result in self.results.items()], self.failures)

    def table(self) -> Table:
        """The rows for a terminal."""
        return comparison_table(self.rows())

    def figures(self) -> dict[str, Any]:
        """What `--json` prints: the figures of each, and what went wrong with the others."""
        results = {name: result.figures() for name, result in self.results.items()}
        return {"results": results, "failures": self.failures, "page": str(self.page)}

    def _repr_html_(self) -> str:
        """The table that Jupyter shows."""
        return page_template("comparison.html.j2").render(columns=COLUMNS, rows=self.rows(), page=self.page.resolve())


def compare_results(folders: list[Path], page: Path, failures: dict[str, str] | None = None) -> Comparison:
    """Compare finished folders, and write a page of them.

    Raises:
        PipelineError: one is none.
    """
    results = read_results(folders)
    write_comparison(page, results, comparison_rows(results, failures or {}))
    return Comparison({name: Result(folder) for (name, _), folder in zip(results, folders, strict=True)}, failures or {}, page)
