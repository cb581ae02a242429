"""`validate:` for models that are no decoders: outputs of the quantized graph beside those of the float one, in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime

from lowbit.pipeline.runtime.partition import Feeds
from lowbit.pipeline.runtime.session import accuracy_levels, load_model, open_model, open_reference
from lowbit.pipeline.validate.metrics import relative_error


def compare_outputs(graph: gs.Graph, candidate: Path, samples: list[Feeds]) -> dict[str, Any]:
    """Run both models on `samples`; the candidate in exact arithmetic and, where it differs, in its own.

    Args:
        graph: the float graph, with the outputs of the quantized one.
        candidate: the quantized model.onnx.

    Returns:
        `outputs`: of each output its relative error and the least cosine similarity of a sample at accuracy_level 0; those at
        the recipe's level under `as_run`.
    """
    expected = outputs_of(open_reference(graph), samples)
    levels = sorted(accuracy_levels(load_model(candidate)) | {0})
    result: dict[str, Any] = {"samples": len(samples), "outputs": _figures(open_model(candidate, 0), samples, expected)}
    if len(levels) > 1:
        result["as_run"] = {"accuracy_levels": levels[1:], "outputs": _figures(open_model(candidate), samples, expected)}
    return result


def outputs_of(session: onnxruntime.InferenceSession, samples: list[Feeds]) -> dict[str, list[np.ndarray]]:
    """What a model makes of each sample, by output."""
    names = [output.name for output in session.get_outputs()]
    runs = [session.run(names, sample) for sample in samples]
    return {name: [run[i] for run in runs] for i, name in enumerate(names)}


def _figures(
    session: onnxruntime.InferenceSession, samples: list[Feeds], expected: dict[str, list[np.ndarray]]
) -> dict[str, dict[str, float]]:
    found = outputs_of(session, samples)
    return {name: output_figures(found[name], expected[name]) for name in expected}


def output_figures(found: list[np.ndarray], expected: list[np.ndarray]) -> dict[str, float]:
    """Relative error over all samples, and the least cosine similarity of one."""
    pairs = [(a.astype(np.float64).ravel(), b.astype(np.float64).ravel()) for a, b in zip(found, expected, strict=True)]
    cosines = [float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), np.finfo(np.float64).tiny)) for a, b in pairs]
    return {
        "relative_error": relative_error(*(np.concatenate(side) for side in zip(*pairs, strict=True))),
        "least_cosine": min(cosines),
    }
