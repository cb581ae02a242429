"""The one loop: checkpoint -> ONNX graph -> passes -> files -> validation -> hand-off, every result recalled if known."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from rich.console import Console

from passes._ops import quantized_matmuls, quantized_weight
from passes.allocate_bits import AllocateBits
from pipeline import export, validate
from pipeline.budget import Context, budget_place, resolve_budget
from pipeline.calibrate import calibrate
from pipeline.calibration_text import calibration_windows
from pipeline.channel_scales import find_channel_scales, set_to_one
from pipeline.checkpoint import SIDE_FILES
from pipeline.convert.targets import TARGETS
from pipeline.errors import PipelineError, ValidationFailed
from pipeline.hand_off import hand_off
from pipeline.hub import resolve
from pipeline.isolate import isolated
from pipeline.manifest import MANIFEST, make_manifest, seal_manifest
from pipeline.onnx_file import MODEL
from pipeline.onnx_folder import write_files
from pipeline.onnx_source import OnnxModel
from pipeline.page import write_pages
from pipeline.pieces import Feeds
from pipeline.planned import Plan, plan_of
from pipeline.recipe import Recipe, Step, Validate
from pipeline.report import megabytes, show_result
from pipeline.run import Run
from pipeline.samples import decoder_samples, samples_for
from pipeline.steps import Steps
from pipeline.store import Store, digest, source_digest, versions, writing
from pipeline.template_check import check_template
from pipeline.validation import validate_samples, validate_text
from pipeline.weights import SourceDigests, entry_of

EXPORT_LIBRARIES = ("torch", "transformers", "optimum", "optimum-onnx", "onnx")
COMPARED_SAMPLES = 4
"""Samples of the validation (windows of text) that both runtimes are compared on."""


def run_recipe(recipe: Recipe, build: Path, model: Path | None, console: Console, store: Store | None = None) -> Path:
    """Run a recipe and return its folder `build/<name>`, which changes only when everything is done.

    Args:
        model: take the checkpoint from this folder instead.
        store: where finished steps are kept, `build/.store` by default.

    Raises:
        PipelineError, PassError: what is wrong, in a sentence; results already made are kept.
    """
    target, asked = build / recipe.name, recipe
    with writing(build):
        target.mkdir(parents=True, exist_ok=True)
    with _locked(target), _work_folder(target) as work:
        kept = store or Store(build / ".store")
        kept.sweep()
        run = Run(recipe, resolve(recipe, model), kept, Steps(console), SourceDigests(kept))
        console.print(f"{recipe.name}: {export.describe(run.checkpoint)}")
        check_template(run.checkpoint)
        with writing(build):
            run.graph_file = graph_file = export_step(run)
            recipe = _allocate(run)
            samples = _rehearse(run, graph_file)
            graph = export.load_graph(graph_file, run.checkpoint)
            for step in recipe.passes:
                _apply(run, graph, step)
            if recipe.calibrate is not None:
                text = _calibration_text(run)
                _channel_scales(run, graph, text)
                _calibrate(run, graph, text)
                _finetune(run, graph, text)
            _write_onnx(run, graph, work / "onnx")
            if recipe.validate is not None:
                validating = validate_text if run.decoder else validate_samples
                validating(run, graph_file, work / "onnx", samples)
            for number, options in enumerate(recipe.convert, 1):
                own = graph if number == len(recipe.convert) else graph.copy()
                hand_off(run, own, options, work, samples[:COMPARED_SAMPLES])
            _check_fit(asked, work)
            (work / "recipe.yaml").write_text(asked.text, "utf-8")
            if asked is not recipe:
                (work / "resolved.yaml").write_text(recipe.text, "utf-8")
            manifest = make_manifest(
                work, recipe, run.checkpoint, steps=run.steps.records, quality=run.quality, hand_offs=run.hand_offs,
                model={"digest": run.model_digest(), "shards": run.shards()}, weights=run.entries, source_of=run.sources.of,
            )  # fmt: skip
            write_pages(work, manifest, run.checkpoint)
            seal_manifest(work, manifest)
            _publish(work, target)
    show_result(console, manifest, target)
    _check_gates(recipe, manifest)
    return target


def export_step(run: Run) -> Path:
    """The float graph of a run's checkpoint, exported now if it is not known."""
    if isinstance(run.checkpoint, OnnxModel):
        return run.checkpoint.file
    options = run.recipe.export
    with run.steps.step("export", options.model_dump(mode="json")) as (record, _):
        record.key = digest(
            "export", run.checkpoint.config, record.options, source_digest("pipeline.export"),
            source_digest("pipeline.weightless"), versions(EXPORT_LIBRARIES),
        )  # fmt: skip
        entry = run.store.get(record.key)
        record.cached = entry is not None
        if entry is None:
            export.check_config(run.checkpoint, options)
            export.check_layers(run.checkpoint)

            def write(folder: Path) -> dict[str, Any]:
                isolated(export.export_graph, run.checkpoint, options, folder / MODEL)
                return {}

            entry = run.store.put(record.key, write)
    return entry.file(MODEL)


def _allocate(run: Run) -> Recipe:
    """The recipe to run: one with a budget becomes one with bits for every weight."""
    if (place := budget_place(run.recipe)) is None:
        return run.recipe
    step = run.recipe.passes[place]
    with run.steps.step("allocate_bits", step.options.model_dump(mode="json")) as (record, report):
        fresh = partial(export.load_graph, run.graph_file, run.checkpoint)
        context = Context(run.recipe, run.checkpoint, run.store, run.sources, fresh)
        run.recipe, notes = resolve_budget(context, place, lambda done: report(done, ""))
        record.notes += notes
    return run.recipe


def _check_fit(asked: Recipe, work: Path) -> None:
    """A budget is kept, or the result is not published."""
    place = budget_place(asked)
    options = None if place is None else asked.passes[place].options
    if not isinstance(options, AllocateBits) or options.fit_bytes is None:
        return
    folder = work / (TARGETS[asked.convert[0].target].folder if asked.convert else "onnx")
    size = sum(file.stat().st_size for file in folder.iterdir())
    if size > options.fit_bytes:
        raise RuntimeError(f"{folder.name} has {size} bytes, fit: {options.fit} allows {options.fit_bytes}")


def _rehearse(run: Run, graph_file: Path) -> list[Feeds]:
    """Everything that can be refused without reading a weight is refused here; returns what models are compared on."""
    with run.steps.step("rehearse", {}):
        graph = export.load_graph(graph_file, run.checkpoint)
        for step in run.recipe.passes:
            step.apply(graph)
        set_to_one(graph)
        if not any(quantized_weight(node) for node in graph.nodes):
            raise PipelineError(f"{run.recipe.file}: this recipe quantizes nothing; add quantize_matmul to passes.")
        _check_disk(plan_of(run.recipe, run.checkpoint, graph, run.store), run.store.root.parent)
        _check_decoder(run)
        samples: list[Feeds] = []
        if run.recipe.validate is not None or run.recipe.convert:
            if run.decoder:
                samples = decoder_samples(validate.token_windows(run.recipe, run.checkpoint))
            else:
                samples = samples_for(run.recipe, run.checkpoint, graph)
        for options in run.recipe.convert:
            TARGETS[options.target](options, run.checkpoint).rehearse(graph.copy())
    return samples


def _check_decoder(run: Run) -> None:
    """What only makes sense for models that generate text is refused for others, and the other way round."""
    options = run.recipe.validate or Validate()
    for name in ("inputs", "max_relative_error") if run.decoder else ("max_kl_divergence", "max_perplexity_ratio"):
        if getattr(options, name) is not None:
            kind = "generates text" if run.decoder else "does not generate text"
            raise PipelineError(f"{run.recipe.file}: validate: {name} means nothing here, the model {kind}. Leave it out.")
    what = export.describe(run.checkpoint)
    for one in run.recipe.convert:
        if TARGETS[one.target].decoders != run.decoder:
            fitting = " or ".join(name for name, target in TARGETS.items() if target.decoders == run.decoder)
            kind = "generate text" if TARGETS[one.target].decoders else "generate no text"
            raise PipelineError(
                f"{run.recipe.file}: target {one.target} is for models that {kind}; for this one ({what}) set convert: "
                f"{{target: {fitting}}}."
            )
    if run.recipe.calibrate is not None and not run.decoder:
        raise PipelineError(f"{run.recipe.file}: calibrate looks at decoders only, and this is none ({what}). Leave it out.")


def _check_disk(plan: Plan, build: Path) -> None:
    free = shutil.disk_usage(build).free
    if plan.disk_bytes > free:
        raise PipelineError(
            f"{build}: this run needs {megabytes(plan.disk_bytes)} of disk, {megabytes(free)} are free. Free some, or "
            "build elsewhere with --build."
        )


def _apply(run: Run, graph: gs.Graph, step: Step) -> None:
    """Apply one pass: the weights it asks for stay lazy, so that each is quantized once, for the finished graph."""
    with run.steps.step(step.name, step.options.model_dump(mode="json")) as (record, _):
        outcome = step.apply(graph)
        record.rewritten, record.skipped = list(outcome.rewritten), dict(outcome.skipped)
        record.notes = list(outcome.notes)
        record.key = digest(run.steps.records[-1].key, step.name, record.options, source_digest(type(step.options).__module__))


def _calibration_text(run: Run) -> np.ndarray:
    options = run.recipe.calibrate
    assert options is not None
    with run.steps.step("calibration text", options.model_dump(mode="json")) as (record, _):
        windows = calibration_windows(options, run.recipe.folder, run.checkpoint, run.model_digest(), run.store)
        record.key = digest(run.model_digest(), windows.tolist())
    return windows


def _channel_scales(run: Run, graph: gs.Graph, text: np.ndarray) -> None:
    """Search what `fold_channel_scales` left open, if it was used."""
    if not set_to_one(graph):
        return
    with run.steps.step("channel scales", {}) as (record, report):
        keys, made = find_channel_scales(graph, text, run.sources, run.store, report)
        record.key = digest(run.steps.records[-1].key, keys)
        record.cached = made == 0
        record.notes.append(f"{made} searched, {len(keys) - made} recalled")


def _calibrate(run: Run, graph: gs.Graph, text: np.ndarray) -> None:
    """Quantize what needs a look at its inputs; the weights stay lazy, their entries are ready when the files are written."""
    options = run.recipe.calibrate
    assert options is not None
    with run.steps.step("calibrate", options.model_dump(mode="json")) as (record, report):
        found = calibrate(graph, options, text, run.sources, run.store, report)
        run.entries = found.entries
        record.key = digest(run.steps.records[-1].key, run.made(), source_digest("pipeline.calibrate"))
        record.cached = found.made == 0
        record.notes.append(f"{found.made} weights quantized, {len(found.entries) - found.made} recalled")


def _finetune(run: Run, graph: gs.Graph, text: np.ndarray) -> None:
    """Train the codes that a pass marked, if any, beginning with those of its method."""
    matmuls = [weight for _, weight in quantized_matmuls(graph)]
    training = next((weight.training for weight in matmuls if weight.training is not None), None)
    if training is None:
        return
    from pipeline.finetune import finetune  # torch, which nothing else here needs

    with run.steps.step("finetune", training.model_dump(mode="json")) as (record, report):
        for weight in matmuls:
            run.entries[weight] = run.entries.get(weight) or entry_of(weight, run.sources, run.store)
        before = run.made()
        run.entries = finetune(graph, run.checkpoint, text, run.entries, run.store, report)
        record.key = digest(run.steps.records[-1].key, run.made(), source_digest("pipeline.finetune"))
        record.notes.append(f"{sum(before[name] != key for name, key in run.made().items())} weights trained")


def _write_onnx(run: Run, graph: gs.Graph, folder: Path) -> None:
    """Quantize, or recall, the weights of the finished graph straight into its files."""
    with run.steps.step("write onnx", {}) as (record, report):
        folder.mkdir()
        start = time.monotonic()

        def progress(done: int, total: int) -> None:
            report(done / total, f"{done / 1e6 / max(time.monotonic() - start, 1e-3):,.0f} MB/s")

        streamed = write_files(graph, folder, run.sources, run.store, progress, run.entries)
        run.entries = streamed.entries
        record.key = digest(run.steps.records[-1].key, run.made(), source_digest("pipeline.weights"))
        record.cached = streamed.recalled == len(run.entries)
        record.notes.append(f"{len(run.entries) - streamed.recalled} weights quantized, {streamed.recalled} recalled")
        for name in SIDE_FILES:
            if (source := run.checkpoint.folder / name).exists():
                shutil.copyfile(source, folder / name)


def _check_gates(recipe: Recipe, manifest: dict[str, Any]) -> None:
    missed = [f"{one['name']}: {one['found']:.4f}, allowed {one['allowed']}" for one in manifest["gates"] if not one["passed"]]
    if missed:
        raise ValidationFailed(f"{recipe.file}: gate missed: {'; '.join(missed)}. All results are kept in the build folder.")


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the folder's lock, or say who does."""
    with (target / ".lock").open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.seek(0)
            raise PipelineError(
                f"{target}: another run (process {stream.read().strip()}) is working here; wait for it, or stop it."
            ) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A folder for results in the making; what an interrupted run left is removed first."""
    for old in target.glob(".work-*"):
        shutil.rmtree(old, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=".work-", dir=target))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(work: Path, target: Path) -> None:
    """Put finished results in place of the old ones; the manifest goes first and comes last."""
    (target / MANIFEST).unlink(missing_ok=True)
    for name in ("onnx", *(target.folder for target in TARGETS.values())):
        shutil.rmtree(target / name, ignore_errors=True)
    for item in sorted(work.iterdir(), key=lambda path: path.name == MANIFEST):
        item.replace(target / item.name)
