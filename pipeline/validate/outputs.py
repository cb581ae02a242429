"""`validate:` for models that are no decoders: outputs of the quantized graph beside those of the float one, in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime

from lowbit.pipeline.report.output_quality import OutputError, OutputErrors, OutputQuality, OutputsAsRun
from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import accuracy_levels, load_model, open_model, open_reference
from lowbit.pipeline.validate.metrics import relative_error


def compare_outputs(graph: gs.Graph, candidate: Path, samples: list[Feeds]) -> OutputQuality:
    """Run both models on `samples`; the candidate in exact arithmetic and, where it differs, in its own.

    Args:
        graph: the float graph, with the outputs of the quantized one.
        candidate: the quantized model.onnx.
    """
    expected = outputs_of(open_reference(graph), samples)
    levels = sorted(accuracy_levels(load_model(candidate)) | {0})
    exact, as_run = _errors(open_model(candidate, 0), samples, expected), None
    if len(levels) > 1:
        outputs = _errors(open_model(candidate), samples, expected)
        as_run = OutputsAsRun(accuracy_levels=tuple(levels[1:]), outputs=outputs)
    return OutputQuality(samples=len(samples), outputs=exact, as_run=as_run)


def outputs_of(session: onnxruntime.InferenceSession, samples: list[Feeds]) -> dict[str, list[np.ndarray]]:
    """What a model makes of each sample, by output."""
    names = [output.name for output in session.get_outputs()]
    runs = [session.run(names, sample) for sample in samples]
    return {name: [run[i] for run in runs] for i, name in enumerate(names)}


def _errors(session: onnxruntime.InferenceSession, samples: list[Feeds], expected: dict[str, list[np.ndarray]]) -> OutputErrors:
    return output_errors(outputs_of(session, samples), expected)


def output_errors(found: dict[str, list[np.ndarray]], expected: dict[str, list[np.ndarray]]) -> OutputErrors:
    """How far each output is from what was expected of it, both one array for each sample."""
    return {name: _error(found[name], expected[name]) for name in expected}


def _error(found: list[np.ndarray], expected: list[np.ndarray]) -> OutputError:
    pairs = [(a.astype(np.float64).ravel(), b.astype(np.float64).ravel()) for a, b in zip(found, expected, strict=True)]
    cosines = [float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), np.finfo(np.float64).tiny)) for a, b in pairs]
    error = relative_error(*(np.concatenate(side) for side in zip(*pairs, strict=True)))
    return OutputError(relative_error=error, least_cosine=min(cosines))
