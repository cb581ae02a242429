"""Finished results, for Python: folders, figures, and what notebooks show."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.table import Table

from lowbit.pipeline.report.comparison import COLUMNS, comparison_rows, comparison_table, read_results, write_comparison
from lowbit.pipeline.report.html import page_template
from lowbit.pipeline.report.manifest import read_manifest
from lowbit.pipeline.report.summary import closing_rows


@dataclass(frozen=True)
class Result:
    """A result that a run finished.

    Attributes:
        folder: with `onnx/`, a folder for each engine, `report.html`, `manifest.json` and the recipe.
    """

    folder: Path

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What manifest.json says: steps, weights, hashes, figures.

        Raises:
            PipelineError: no run has finished in the folder.
        """
        return read_manifest(self.folder)

    @property
    def name(self) -> str:
        """What the recipe is called."""
        return str(self.manifest["recipe"])

    @property
    def quality(self) -> SimpleNamespace:
        """How far the ONNX model is from the float model: `kl_divergence` (nats per token), `perplexity`, `top1_agreement`; of
        models that write no text, `outputs`. Empty where the recipe does not validate."""
        return SimpleNamespace(**self.manifest["quality"].get("onnxruntime", {}))

    @property
    def size(self) -> SimpleNamespace:
        """`onnx_bytes`, `mnn_bytes` and so on, and `bits_per_weight`, scales and zero points counted."""
        return SimpleNamespace(**self.manifest["size"])

    def figures(self) -> dict[str, Any]:
        """What `--json` prints: all of the manifest but single weights, steps and hashes."""
        left_out = ("weights", "steps", "files", "model", "recipe_text")
        return {"folder": str(self.folder), **{k: v for k, v in self.manifest.items() if k not in left_out}}

    def rows(self) -> list[tuple[str, str]]:
        """Names and figures, as a run prints them."""
        return closing_rows(self.manifest)

    def __str__(self) -> str:
        """Figures line by line, and where the files are."""
        return "\n".join([f"{self.name}: {self.folder}", *(f"  {name}: {figure}" for name, figure in self.rows())])

    def _repr_html_(self) -> str:
        """The card that Jupyter shows."""
        return page_template("result.html.j2").render(name=self.name, rows=self.rows(), folder=self.folder.resolve())


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
    rows = comparison_rows(results, failures or {})
    write_comparison(page, results, rows)
    return Comparison({name: Result(folder) for (name, _), folder in zip(results, folders, strict=True)}, failures or {}, page)
