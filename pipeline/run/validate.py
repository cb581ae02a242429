"""The steps that validate: text for models that write it, samples for others; known figures are recalled."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.export.support import is_decoder
from lowbit.pipeline.onnx_io.folder import write_files
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.recipe.edit import plain_steps
from lowbit.pipeline.recipe.recipe import PassEntry, Recipe
from lowbit.pipeline.report.output_quality import OutputQuality
from lowbit.pipeline.report.text_quality import TextQuality
from lowbit.pipeline.run.context import RUNTIME_LIBRARIES, Run
from lowbit.pipeline.run.quantize import WRITE
from lowbit.pipeline.run.step import Step, Task
from lowbit.pipeline.runtime.memory import too_large
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.validate.greedy import continuations
from lowbit.pipeline.validate.outputs import compare_outputs
from lowbit.pipeline.validate.reference import write_reference
from lowbit.pipeline.validate.text import compare

HIDDEN = "hidden.npy"
"""The float model's states before its output layer, in the entry of the step `reference`."""


def validating_steps(recipe: Recipe, checkpoint: Checkpoint) -> list[Step]:
    """How far the quantized model is from the float one; gates are options, but figures do not depend on them."""
    if recipe.validate is None:
        return []
    options = recipe.validate.model_dump(mode="json")
    if not is_decoder(checkpoint, recipe.export):
        inputs = ("graph", "weights", "samples", WRITE)
        return [Step("validate", _compare_outputs, options, inputs, [], (compare_outputs,), RUNTIME_LIBRARIES)]
    steps = [Step("reference", _refer, options, ("graph", "weights", "samples"), [], (write_reference,), RUNTIME_LIBRARIES)]
    fits = too_large(checkpoint) is None
    if fits and recipe.validate.plain_rtn and (plain := plain_steps(recipe)):
        applied = [(e.name, e.options.model_dump(mode="json"), source_digest(type(e.options))) for e in plain]
        steps.append(Step("plain rtn", partial(_round, plain=plain), {}, ("reference",), applied, (compare, write_files)))
    compared = Step(
        "validate", partial(_compare_text, fits=fits), options, ("reference", WRITE), fits, (compare, continuations)
    )
    return [*steps, compared]


def _compare_outputs(run: Run, task: Task) -> None:
    """Compare outputs with those of the float model on the samples of the run."""

    def compute() -> OutputQuality:
        reference = load_graph(run.graph_file, run.checkpoint)
        for entry in run.recipe.passes:
            if entry.options.changes_outputs:
                entry.apply(reference)
        return compare_outputs(reference, run.work / "onnx" / MODEL, run.samples)

    run.quality = run.quality.with_figures(onnxruntime=task.recall_model(TypeAdapter(OutputQuality), compute))


def _refer(run: Run, task: Task) -> None:
    """Keep what the float model thinks of the text."""

    def write(folder: Path) -> dict[str, Any]:
        write_reference(run.graph_file, run.checkpoint, _windows(run), folder / HIDDEN, task.progress)
        return {}

    run.hidden = task.recall(write).file(HIDDEN)


def _round(run: Run, task: Task, plain: list[PassEntry]) -> None:
    """What the same bits and blocks are worth with codes by plain rounding."""
    folder = run.work / "plain"

    def compute() -> TextQuality:
        graph = load_graph(run.graph_file, run.checkpoint)
        for entry in plain:
            entry.apply(graph)
        folder.mkdir()
        write_files(graph, folder, run.sources, run.store, lambda done, total: None, {})
        model = folder / MODEL
        figures = compare(run.graph_file, run.checkpoint, run.hidden, model, _windows(run), task.progress, as_run=False)
        shutil.rmtree(folder)
        return figures

    run.quality = run.quality.with_figures(plain_rtn=task.recall_model(TypeAdapter(TextQuality), compute))


def _compare_text(run: Run, task: Task, fits: bool) -> None:
    """Compare logits with those of the float model on windows of text, and what both go on to write if both fit into memory."""
    model = run.work / "onnx" / MODEL

    def compute() -> TextQuality:
        windows = _windows(run)
        figures = compare(run.graph_file, run.checkpoint, run.hidden, model, windows, task.progress)
        written = continuations(run.graph_file, run.checkpoint, model, windows) if fits else None
        return figures.model_copy(update={"continuations": written})

    run.quality = run.quality.with_figures(onnxruntime=task.recall_model(TypeAdapter(TextQuality), compute))


def _windows(run: Run) -> npt.NDArray[np.int64]:
    return np.concatenate([sample["input_ids"] for sample in run.samples])
