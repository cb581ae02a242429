"""The steps that quantize: passes, calibration, fine-tuning, files. Each depends on the one before it."""

from __future__ import annotations

import shutil
import time
from functools import partial

from lowbit.passes.graph.quantized_ops import quantized_matmuls
from lowbit.pipeline.calibrate.channel_scales import find_channel_scales
from lowbit.pipeline.calibrate.dataset import calibration_windows
from lowbit.pipeline.calibrate.sequential import calibrate
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.onnx_io.coarse_scales import coarse_scales
from lowbit.pipeline.onnx_io.entry import entry_of
from lowbit.pipeline.onnx_io.folder import write_files
from lowbit.pipeline.onnx_io.from_source import chosen_by_data, wrong_weights
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.recipe.recipe import PassEntry, Recipe
from lowbit.pipeline.recipe.sections import Calibrate
from lowbit.pipeline.run.context import Run
from lowbit.pipeline.run.step import Step, Task

TEXT, WRITE = "calibration text", "write onnx"


def quantizing_steps(recipe: Recipe) -> list[Step]:
    """From the float graph to the files of the quantized one, made by `WRITE`, and a look at whether they hold its codes."""
    before, steps = "rehearse", []
    for number, entry in enumerate(recipe.passes):
        steps.append(_pass_step(entry, before, f"pass {number}"))
        before = f"pass {number}"
    if recipe.calibrate is not None:
        steps += _reading_steps(recipe, recipe.calibrate, before)
        before = steps[-1].name
    steps.append(Step(WRITE, _write_onnx, inputs=(before,), code=(write_files,)))
    return [*steps, Step("verify codes", _verify, inputs=(WRITE,), code=(wrong_weights,))]


def _pass_step(entry: PassEntry, before: str, identity: str) -> Step:
    options = entry.options.model_dump(mode="json")
    return Step(entry.name, partial(_apply, entry=entry), options, (before,), code=(type(entry.options),), identity=identity)


def _reading_steps(recipe: Recipe, options: Calibrate, before: str) -> list[Step]:
    """What passes leave to a run that reads text, in the order in which each needs what the one before found."""
    phases = {phase for entry in recipe.passes for phase in entry.options.phases}
    dumped = options.model_dump(mode="json")
    steps = [Step(TEXT, partial(_read_text, options=options), dumped, ("weights",))]
    if "scaling" in phases:
        steps.append(Step("channel scales", _scale, inputs=(before, TEXT), code=(find_channel_scales,)))
        before = "channel scales"
    if "calibration" in phases:
        steps.append(Step("calibrate", partial(_calibrate, options=options), dumped, (before, TEXT), code=(calibrate,)))
        before = "calibrate"
    trained = next((entry.options for entry in recipe.passes if "training" in entry.options.phases), None)
    if trained is not None:
        steps.append(Step("finetune", _finetune, trained.model_dump(mode="json"), (before, TEXT), code=(_finetune,)))
    return steps


def _apply(run: Run, task: Task, entry: PassEntry) -> None:
    """Apply one pass: the weights it asks for stay lazy, so that each is quantized once, for the finished graph."""
    outcome = entry.apply(run.graph)
    task.record.rewritten, task.record.skipped = list(outcome.rewritten), dict(outcome.skipped)
    task.record.notes += outcome.notes


def _read_text(run: Run, task: Task, options: Calibrate) -> None:
    run.text = calibration_windows(options, run.recipe.folder, run.checkpoint, run.key("weights"), run.store)
    task.remember(run.text.tolist())


def _scale(run: Run, task: Task) -> None:
    """Search the scales that passes left open; each is recalled by itself."""
    keys, searched = find_channel_scales(run.graph, run.text, run.sources, run.store, task.report)
    task.remember(keys)
    task.recalled_each(searched, len(keys), "searched")


def _calibrate(run: Run, task: Task, options: Calibrate) -> None:
    """Quantize what needs a look at its inputs; the weights stay lazy, their entries are ready when the files are written."""
    calibrated = calibrate(run.graph, options, run.text, run.sources, run.store, task.report)
    run.entries = calibrated.entries
    task.remember(run.made())
    task.recalled_each(calibrated.made, len(calibrated.entries), "weights quantized")


def _finetune(run: Run, task: Task) -> None:
    """Train the codes that a pass marked, beginning with those of its method."""
    from lowbit.pipeline.calibrate.finetune import finetune  # torch, which nothing else here needs

    for _, weight in quantized_matmuls(run.graph):
        run.entries[weight] = run.entries.get(weight) or entry_of(weight, run.sources, run.store)
    before = run.made()
    run.entries = finetune(run.graph, run.checkpoint, run.text, run.entries, run.store, task.report)
    task.remember(run.made())
    task.record.notes.append(f"{sum(before[name] != key for name, key in run.made().items())} weights trained")


def _write_onnx(run: Run, task: Task) -> None:
    """Quantize, or recall, the weights of the finished graph straight into its files."""
    folder = run.work / "onnx"
    folder.mkdir()
    start = time.monotonic()

    def progress(done: int, total: int) -> None:
        task.report(done / total, f"{done / 1e6 / max(time.monotonic() - start, 1e-3):,.0f} MB/s")

    streamed = write_files(run.graph, folder, run.sources, run.store, progress, run.entries)
    run.entries = streamed.entries
    task.remember(run.made())
    task.recalled_each(len(run.entries) - streamed.recalled, len(run.entries), "weights quantized")
    task.record.notes += coarse_scales(run.entries)
    for name, file in run.checkpoint.side_files().items():
        shutil.copyfile(file, folder / name)


def _verify(run: Run, task: Task) -> None:
    """Hold a sample of the codes of every weight against the checkpoint; what is wrong is not kept."""
    model = run.work / "onnx" / MODEL
    wrong = wrong_weights(run.graph, model, run.entries)
    if not wrong:
        task.record.notes.append(
            f"codes of {len(run.entries)} weights are those of the checkpoint, by a sample of rows of each"
        )
        return
    for weight, entry in run.entries.items():
        if weight in wrong or chosen_by_data(weight):  # the latter saw what the wrong ones make of the text
            run.sources.forget(weight.source)
            run.store.remove(entry)
    weight, fault = next(iter(wrong.items()))
    others = f", nor are those of {len(wrong) - 1} others" if len(wrong) > 1 else ""
    raise PipelineError(
        f"{weight.name}: its codes are not those of the checkpoint ({fault}){others}. They came from {run.store.root} and were "
        "removed there. Run the recipe again: they are made anew."
    )
