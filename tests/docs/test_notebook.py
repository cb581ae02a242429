"""The notebook of the documentation runs, and shows a result as a card and a comparison as a table."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebook.ipynb"


def test_the_notebook_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not kept: they would grow old"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("notebook-q3" in html and "bits per weight" in html for html in shown), "a card"
    assert any("<th>KL</th>" in html and "notebook-q2" in html for html in shown), "a comparison"
    printed = "".join(str(output.get("text", "")) + str(output.get("data", {}).get("text/plain", "")) for output in outputs)
    assert "write onnx" in printed, "progress, a line a step"
    assert (tmp_path / "build" / "notebook-q2" / "mnn").is_dir()
