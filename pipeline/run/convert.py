"""The steps that hand off: a finished ONNX model -> another engine's folder: lowered, written, proven, compared."""

from __future__ import annotations

import importlib
import shutil

from pydantic import TypeAdapter

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.registry import make_target
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.recipe.sections import Convert
from lowbit.pipeline.report.engine_quality import Compared, NotCompared
from lowbit.pipeline.report.records import HandOff
from lowbit.pipeline.run.context import RUNTIME_LIBRARIES, Run
from lowbit.pipeline.run.prepare import COMPARED_SAMPLES
from lowbit.pipeline.run.quantize import WRITE
from lowbit.pipeline.run.step import Step, Task
from lowbit.pipeline.runtime.memory import too_large
from lowbit.pipeline.runtime.partition import Feeds


def converting_steps(recipe: Recipe, checkpoint: Checkpoint) -> list[Step]:
    """The hand-offs, one after the other."""
    return [step for options in recipe.convert for step in Conversion(options, checkpoint).steps()]


class Conversion:
    """One engine's folder in the making.

    Its steps raise PassError or ConvertError if the engine cannot hold the model, or the result is not the same.
    """

    def __init__(self, options: Convert, checkpoint: Checkpoint) -> None:
        self.options = options
        self.target = make_target(options, checkpoint)

    def steps(self) -> list[Step]:
        """Each depends on the one before it; the comparison on the folder, the float model and the text."""
        target, folder = self.target, self.options.folder
        options = self.options.model_dump(mode="json", exclude={"compare"})
        extent = {"compare": self.options.compare}
        lowered, written, proven, compared = (f"{folder} {verb}" for verb in ("lowered", "written", "proven", "compared"))
        workers = tuple(map(importlib.import_module, target.sources))
        libraries = (*target.packages, *RUNTIME_LIBRARIES)
        seen = (written, "weights", "graph", "compared")
        return [
            Step("lower", self._lower, {"target": options["target"]}, (WRITE,), code=(type(target),), identity=lowered),
            Step("convert", self._write, options, (lowered,), packages=target.packages, identity=written),
            Step("prove", self._prove, inputs=(written,), identity=proven),
            Step("compare runtimes", self._compare, extent, seen, code=workers, packages=libraries, identity=compared),
        ]

    def _lower(self, run: Run, task: Task) -> None:
        self.model, self.folder, self.scratch = run.work / "onnx" / MODEL, run.work / self.options.folder, run.work / "scratch"
        self.folder.mkdir()
        self.scratch.mkdir()
        self.error = self.target.lower(run.graph.copy(), self.model, run.samples[:COMPARED_SAMPLES])
        if self.error is not None:
            task.record.notes.append(f"logits within {self.error:.1e} of the quantized graph's")

    def _write(self, run: Run, task: Task) -> None:
        task.record.notes += self.target.write(self.model, self.folder, self.scratch, task.progress)

    def _prove(self, run: Run, task: Task) -> None:
        proof = self.target.prove(self.model, self.folder, self.scratch)
        task.record.notes.append(f"{proof.weights_checked:,} codes of {proof.layers} layers are equal, with their scales")
        run.hand_offs[self.options.folder] = HandOff(
            target=self.options.target, options=self.options.model_dump(mode="json", exclude={"target"}),
            label=self.target.label, modes=self.target.modes, usage=self.target.usage, bit_exact=True,
            weights_checked=proof.weights_checked, lowering_relative_error=self.error, max_relative_error=None,
        )  # fmt: skip

    def _compare(self, run: Run, task: Task) -> None:
        """Figures of both engines, recalled where nothing that they depend on changed; or why they were not compared."""
        folder = self.options.folder
        asked = "the recipe says compare: none" if self.options.compare == "none" else None
        if (reason := asked or too_large(run.checkpoint) or self.target.missing()) is not None:
            task.record.notes.append(f"runtimes not compared: {reason}")
            run.quality = run.quality.with_figures(**{folder: NotCompared(skipped=reason)})
        else:
            figures = task.recall_model(TypeAdapter(Compared), lambda: self._figures(run.samples))
            run.quality = run.quality.with_figures(**{folder: figures})
            error = figures.modes[next(iter(self.target.modes))].relative_error
            run.hand_offs[folder] = run.hand_offs[folder].model_copy(update={"max_relative_error": error})
        shutil.rmtree(self.scratch)

    def _figures(self, samples: list[Feeds]) -> Compared:
        count = 1 if self.options.compare == "quick" else COMPARED_SAMPLES
        return self.target.compare(self.model, self.folder, samples[:count], self.scratch)
