"""The step `validate` of a run: text for models that write it, samples for others; known figures are recalled."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.onnx_io.folder import write_files
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.recipe.edit import plain_steps
from lowbit.pipeline.report.progress import Record
from lowbit.pipeline.report.text_quality import TextQuality
from lowbit.pipeline.run.context import RUNTIME_LIBRARIES, Run, recall
from lowbit.pipeline.runtime.memory import too_large
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.validate.greedy import continuations
from lowbit.pipeline.validate.outputs import compare_outputs
from lowbit.pipeline.validate.reference import write_reference
from lowbit.pipeline.validate.text import compare


def validate_samples(run: Run, graph_file: Path, folder: Path, samples: list[Feeds]) -> None:
    """Compare the outputs of the model in `folder` with those of the float model, on `samples`."""
    options = run.recipe.validate
    assert options is not None
    with run.steps.step("validate", options.model_dump(mode="json")) as (record, _):
        reference = load_graph(graph_file, run.checkpoint)
        for step in run.recipe.passes:
            if step.options.changes_outputs:
                step.apply(reference)
        figures = compare_outputs(reference, folder / MODEL, samples)
        record.key = digest("validate outputs", run.steps.records[-1].key, figures.model_dump(mode="json"))
    run.quality = run.quality.with_figures(onnxruntime=figures)


def validate_text(run: Run, graph_file: Path, folder: Path, samples: list[Feeds]) -> None:
    """Compare the logits of the decoder in `folder` with those of the float model, on windows of text; and what plain rounding
    would give."""
    options = run.recipe.validate
    assert options is not None
    windows = np.concatenate([sample["input_ids"] for sample in samples])
    with run.steps.step("reference", options.model_dump(mode="json")) as (record, report):
        record.key = digest(
            "reference", run.model_digest(), graph_file.parent.name, windows.tolist(),
            source_digest(write_reference), versions(RUNTIME_LIBRARIES),
        )  # fmt: skip
        reference = run.store.get(record.key)
        record.cached = reference is not None

        def write(to: Path) -> dict[str, Any]:
            write_reference(graph_file, run.checkpoint, windows, to / "hidden.npy", lambda done: report(done, ""))
            return {}

        reference = reference or run.store.put(record.key, write)
    fits = too_large(run.checkpoint) is None
    if fits and plain_steps(run.recipe):
        _plain(run, graph_file, reference.file("hidden.npy"), windows, folder.with_name("plain"))
    with run.steps.step("validate", options.model_dump(mode="json")) as (record, report):
        made = [_recorded(run, name).key for name in ("reference", "write onnx")]
        record.key = digest("validate", made, fits, source_digest(compare, continuations))

        def compute() -> TextQuality:
            hidden, model_file = reference.file("hidden.npy"), folder / MODEL
            found = compare(graph_file, run.checkpoint, hidden, model_file, windows, lambda done: report(done, ""))
            written = continuations(graph_file, run.checkpoint, model_file, windows) if fits else None
            return found.model_copy(update={"continuations": written})

        run.quality = run.quality.with_figures(onnxruntime=recall(run, record, TypeAdapter(TextQuality), compute))


def _plain(run: Run, graph_file: Path, hidden: Path, windows: np.ndarray, folder: Path) -> None:
    """What the same bits and blocks are worth with codes by plain rounding."""
    steps = plain_steps(run.recipe)
    with run.steps.step("plain rtn", {}) as (record, report):
        said = [(s.name, s.options.model_dump(mode="json"), source_digest(type(s.options))) for s in steps]
        record.key = digest("plain rtn", _recorded(run, "reference").key, said, source_digest(compare, write_files))

        def compute() -> TextQuality:
            graph = load_graph(graph_file, run.checkpoint)
            for step in steps:
                step.apply(graph)
            folder.mkdir()
            write_files(graph, folder, run.sources, run.store, lambda done, total: None, {})
            found = compare(
                graph_file, run.checkpoint, hidden, folder / MODEL, windows, lambda done: report(done, ""), as_run=False
            )
            shutil.rmtree(folder)
            return found

        run.quality = run.quality.with_figures(plain_rtn=recall(run, record, TypeAdapter(TextQuality), compute))


def _recorded(run: Run, name: str) -> Record:
    """The last step of a name."""
    return next(record for record in reversed(run.steps.records) if record.name == name)
