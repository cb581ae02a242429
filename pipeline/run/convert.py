"""`convert:` a finished ONNX model -> another engine's folder: lowered, written, proven, compared."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
from pydantic import TypeAdapter

from lowbit.pipeline.convert.base import Target
from lowbit.pipeline.convert.registry import make_target
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.recipe.sections import Convert
from lowbit.pipeline.report.engine_quality import Compared, EngineQuality, NotCompared
from lowbit.pipeline.report.manifest import HandOff
from lowbit.pipeline.report.progress import Record
from lowbit.pipeline.run.context import RUNTIME_LIBRARIES, Run, recall
from lowbit.pipeline.runtime.memory import too_large
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.store.digests import digest, sha256, versions
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.validate.dataset import samples_digest


def hand_off(run: Run, graph: gs.Graph, options: Convert, work: Path, samples: list[Feeds]) -> None:
    """Make one engine's folder in `work` from `graph`, which is spoilt, and the ONNX model that was written from it.

    Raises:
        PassError, ConvertError: the engine cannot hold the model, or the result is not the same.
    """
    target = make_target(options, run.checkpoint)
    model_file, folder, scratch = work / "onnx" / MODEL, work / options.folder, work / "scratch"
    folder.mkdir()
    scratch.mkdir()
    before = run.steps.records[-1].key
    with run.steps.step("lower", {"target": options.target}) as (record, _):
        record.key = digest(before, source_digest(type(target)))
        error = target.lower(graph, model_file, samples)
        if error is not None:
            record.notes.append(f"logits within {error:.1e} of the quantized graph's")
    with run.steps.step("convert", options.model_dump(mode="json")) as (record, report):
        record.key = digest(run.steps.records[-1].key, record.options, versions(target.packages))
        record.notes += target.write(model_file, folder, scratch, lambda done: report(done, ""))
    with run.steps.step("prove", {}) as (record, _):
        proven = target.prove(model_file, folder, scratch)
        record.notes.append(f"{proven.weights_checked:,} codes of {proven.layers} layers are equal, with their scales")
    with run.steps.step("compare runtimes", {}) as (record, _):
        figures = _compare(run, record, target, model_file, folder, samples, scratch)
    exact = next(iter(target.modes))
    run.hand_offs[options.folder] = HandOff(
        target=options.target, options=options.model_dump(mode="json", exclude={"target"}), label=target.label,
        modes=target.modes, usage=target.usage, bit_exact=True, weights_checked=proven.weights_checked,
        lowering_relative_error=error,
        max_relative_error=None if isinstance(figures, NotCompared) else figures.modes[exact].relative_error,
    )  # fmt: skip
    run.quality = run.quality.with_figures(**{options.folder: figures})
    shutil.rmtree(scratch)


def _compare(
    run: Run, record: Record, target: Target[Any], model_file: Path, folder: Path, samples: list[Feeds], scratch: Path
) -> EngineQuality:
    """Figures of both engines, recalled where nothing that they depend on changed; or why they were not compared."""
    reason = too_large(run.checkpoint) or target.missing()
    if reason is not None:
        record.notes.append(f"runtimes not compared: {reason}")
        return NotCompared(skipped=reason)
    record.key = digest(
        run.steps.records[-2].key, run.model_digest(), sha256(run.graph_file), samples_digest(samples),
        source_digest(*map(importlib.import_module, target.sources)), versions((*target.packages, *RUNTIME_LIBRARIES)),
        run.made(),
    )  # fmt: skip
    return recall(run, record, TypeAdapter(Compared), lambda: target.compare(model_file, folder, samples, scratch))
