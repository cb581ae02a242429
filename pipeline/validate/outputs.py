"""`validate:` for models that are no decoders: outputs of the quantized graph beside those of the float one, in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
import onnxruntime

from lowbit.pipeline.report.output_quality import OutputError, OutputErrors, OutputQuality, OutputsAsRun
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import accuracy_levels, load_model, open_model, open_reference
from lowbit.pipeline.validate.metrics import relative_error

Outputs = dict[str, list[npt.NDArray[Any]]]
"""What a model makes of samples: by the output's name, an array for each sample."""


def compare_outputs(graph: gs.Graph, candidate: Path, samples: list[Feeds]) -> OutputQuality:
    """Run both models on `samples`; the candidate in exact arithmetic and, where it differs, in its own.

    Args:
        graph: the float graph, with the outputs of the quantized one.
        candidate: the quantized model.onnx.
    """
    expected = outputs_of(open_reference(graph), samples)
    levels = sorted(accuracy_levels(load_model(candidate)) | {0})
    errors, as_run = output_errors(outputs_of(open_model(candidate, 0), samples), expected), None
    if len(levels) > 1:
        rounded = output_errors(outputs_of(open_model(candidate), samples), expected)
        as_run = OutputsAsRun(accuracy_levels=tuple(levels[1:]), outputs=rounded)
    return OutputQuality(samples=len(samples), outputs=errors, as_run=as_run)


def outputs_of(session: onnxruntime.InferenceSession, samples: list[Feeds]) -> Outputs:
    """What a model makes of each sample, by output."""
    names = [output.name for output in session.get_outputs()]
    runs = [session.run(names, sample) for sample in samples]
    return {name: [run[i] for run in runs] for i, name in enumerate(names)}


def output_errors(outputs: Outputs, expected: Outputs) -> OutputErrors:
    """How far each output is from what was expected of it."""
    return {name: _error(outputs[name], expected[name]) for name in expected}


def _error(arrays: list[npt.NDArray[Any]], expected: list[npt.NDArray[Any]]) -> OutputError:
    pairs = [(a.astype(np.float64).ravel(), b.astype(np.float64).ravel()) for a, b in zip(arrays, expected, strict=True)]
    cosines = [float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), np.finfo(np.float64).tiny)) for a, b in pairs]
    error = relative_error(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    return OutputError(relative_error=error, least_cosine=min(cosines))
