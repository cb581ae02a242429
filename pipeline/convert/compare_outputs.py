"""An engine against onnxruntime on the same codes, for models that write no text: every output on every sample."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy.typing as npt

from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.report.engine_quality import EngineOnOutputs, OutputMode
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import open_model
from lowbit.pipeline.validate.outputs import output_errors, outputs_of

TOLERANCE = 1e-4
"""Largest relative difference of an output in float arithmetic."""

Outputs = dict[str, list[npt.NDArray[Any]]]
"""What a model makes of each sample, by output."""
Ask = Callable[[list[str]], dict[str, Outputs]]
"""Runs an engine in every one of its modes, for the outputs named; the first is in float arithmetic."""


def compare_outputs(engine: str, ask: Ask, model_file: Path, samples: list[Feeds]) -> EngineOnOutputs:
    """Run an engine, and `model_file` in onnxruntime, on `samples`.

    Raises:
        ConvertError: in float arithmetic the two differ by more than rounding.
    """
    expected = outputs_of(open_model(model_file, accuracy_level=0), samples)
    answers = ask(list(expected))
    figures = {name: _figures(outputs, expected) for name, outputs in answers.items()}
    worst = figures[next(iter(answers))].relative_error
    if not worst <= TOLERANCE:
        raise ConvertError(
            f"{engine} and onnxruntime disagree on the same codes: outputs differ ({worst:.2e}, at most {TOLERANCE:.0e} is "
            "rounding). The result is not to be trusted."
        )
    return EngineOnOutputs(samples=len(samples), **figures)


def _figures(outputs: Outputs, expected: Outputs) -> OutputMode:
    errors = output_errors(outputs, expected)
    return OutputMode(relative_error=max(error.relative_error for error in errors.values()), outputs=errors)
