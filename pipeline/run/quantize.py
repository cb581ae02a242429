"""The steps that quantize: passes, calibration, fine-tuning, files."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.graph.quantized_ops import quantized_matmuls
from lowbit.pipeline.calibrate.channel_scales import find_channel_scales, set_to_one
from lowbit.pipeline.calibrate.dataset import calibration_windows
from lowbit.pipeline.calibrate.sequential import calibrate
from lowbit.pipeline.checkpoint.huggingface import SIDE_FILES
from lowbit.pipeline.onnx_io.entry import entry_of
from lowbit.pipeline.onnx_io.folder import write_files
from lowbit.pipeline.recipe.recipe import Step
from lowbit.pipeline.run.context import Run
from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.source_digest import source_digest


def apply_step(run: Run, graph: gs.Graph, step: Step) -> None:
    """Apply one pass: the weights it asks for stay lazy, so that each is quantized once, for the finished graph."""
    with run.steps.step(step.name, step.options.model_dump(mode="json")) as (record, _):
        outcome = step.apply(graph)
        record.rewritten, record.skipped = list(outcome.rewritten), dict(outcome.skipped)
        record.notes = list(outcome.notes)
        record.key = digest(run.steps.records[-1].key, step.name, record.options, source_digest(type(step.options)))


def calibration_text_step(run: Run) -> np.ndarray:
    options = run.recipe.calibrate
    assert options is not None
    with run.steps.step("calibration text", options.model_dump(mode="json")) as (record, _):
        windows = calibration_windows(options, run.recipe.folder, run.checkpoint, run.model_digest(), run.store)
        record.key = digest(run.model_digest(), windows.tolist())
    return windows


def channel_scales_step(run: Run, graph: gs.Graph, text: np.ndarray) -> None:
    """Search what `fold_channel_scales` left open, if it was used."""
    if not set_to_one(graph):
        return
    with run.steps.step("channel scales", {}) as (record, report):
        keys, made = find_channel_scales(graph, text, run.sources, run.store, report)
        record.key = digest(run.steps.records[-1].key, keys)
        record.cached = made == 0
        record.notes.append(f"{made} searched, {len(keys) - made} recalled")


def calibrate_step(run: Run, graph: gs.Graph, text: np.ndarray) -> None:
    """Quantize what needs a look at its inputs; the weights stay lazy, their entries are ready when the files are written."""
    options = run.recipe.calibrate
    assert options is not None
    with run.steps.step("calibrate", options.model_dump(mode="json")) as (record, report):
        found = calibrate(graph, options, text, run.sources, run.store, report)
        run.entries = found.entries
        record.key = digest(run.steps.records[-1].key, run.made(), source_digest(calibrate))
        record.cached = found.made == 0
        record.notes.append(f"{found.made} weights quantized, {len(found.entries) - found.made} recalled")


def finetune_step(run: Run, graph: gs.Graph, text: np.ndarray) -> None:
    """Train the codes that a pass marked, if any, beginning with those of its method."""
    matmuls = [weight for _, weight in quantized_matmuls(graph)]
    training = next((weight.training for weight in matmuls if weight.training is not None), None)
    if training is None:
        return
    from lowbit.pipeline.calibrate.finetune import finetune  # torch, which nothing else here needs

    with run.steps.step("finetune", training.model_dump(mode="json")) as (record, report):
        for weight in matmuls:
            run.entries[weight] = run.entries.get(weight) or entry_of(weight, run.sources, run.store)
        before = run.made()
        run.entries = finetune(graph, run.checkpoint, text, run.entries, run.store, report)
        record.key = digest(run.steps.records[-1].key, run.made(), source_digest(finetune))
        record.notes.append(f"{sum(before[name] != key for name, key in run.made().items())} weights trained")


def write_onnx_step(run: Run, graph: gs.Graph, folder: Path) -> None:
    """Quantize, or recall, the weights of the finished graph straight into its files."""
    with run.steps.step("write onnx", {}) as (record, report):
        folder.mkdir()
        start = time.monotonic()

        def progress(done: int, total: int) -> None:
            report(done / total, f"{done / 1e6 / max(time.monotonic() - start, 1e-3):,.0f} MB/s")

        streamed = write_files(graph, folder, run.sources, run.store, progress, run.entries)
        run.entries = streamed.entries
        record.key = digest(run.steps.records[-1].key, run.made(), source_digest(write_files))
        record.cached = streamed.recalled == len(run.entries)
        record.notes.append(f"{len(run.entries) - streamed.recalled} weights quantized, {streamed.recalled} recalled")
        for name in SIDE_FILES:
            if (source := run.checkpoint.folder / name).exists():
                shutil.copyfile(source, folder / name)
