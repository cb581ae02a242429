"""A problem -> the sensitivity of every layer to every choice, measured as the recipe says, or recalled."""

from __future__ import annotations

from lowbit.passes.quantize_matmul import find_matmuls
from lowbit.pipeline.calibrate.dataset import calibration_windows
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.export.support import is_decoder
from lowbit.pipeline.mixed_precision.problem import Context, Problem
from lowbit.pipeline.mixed_precision.sensitivity import Layer, Progress, Sensitivities, SensitivityMetric, WeightError
from lowbit.pipeline.mixed_precision.sensitivity_kl import OutputDivergence
from lowbit.pipeline.recipe.sections import Calibrate
from lowbit.pipeline.runtime.memory import too_large
from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.weight_keys import model_digest

FEW_LONG, MANY_SHORT = Calibrate(windows=8, window=256), Calibrate(windows=32, window=64)
WINDOWS = {"kl": FEW_LONG, "fisher": MANY_SHORT, "output_mse": MANY_SHORT}
"""The text that sensitivity is measured on: docstrings, never what `validate` measures on. Many short windows suit `fisher`,
which has one sample of the gradient from each; on the demo it is within 18% (standard deviation) of `kl`, weight by weight."""


def measure_sensitivities(context: Context, problem: Problem, progress: Progress) -> Sensitivities:
    """What every choice costs; what was measured before is recalled.

    Raises:
        PipelineError: it cannot be measured so for this model.
    """
    return _metric(context, problem).measure(problem.forms, progress)


def recall_sensitivities(context: Context, problem: Problem) -> Sensitivities | None:
    """What every choice costs, if all of it was measured before."""
    weights = context.checkpoint.weights.values()
    if not all(context.sources.known(weight) is not None for weight in weights):
        return None
    return _metric(context, problem).known(problem.forms)


def _metric(context: Context, problem: Problem) -> SensitivityMetric:
    """How sensitivity is measured: one weight is quantized, all others are float."""
    recipe, store, sensitivity = context.recipe, context.store, problem.options.sensitivity
    graph = context.fresh_graph()
    applied = [step for step in recipe.passes[: problem.entry.position] if not step.name.startswith("quantize_")]
    for step in applied:
        context.apply(step, graph)
    names = {layer.name for layer in problem.layers}
    layers = [Layer(name, node, operand.weight) for name, (node, operand) in find_matmuls(graph).items() if name in names]
    if sensitivity == "weight_mse":
        return WeightError(layers, problem.method, context.sources, store)
    if not is_decoder(context.checkpoint, recipe.export):
        raise PipelineError(f"{recipe.file}: sensitivity: {sensitivity} needs a decoder; set sensitivity: weight_mse.")
    if sensitivity == "kl" and (reason := too_large(context.checkpoint)) is not None and not context.sketched:
        raise PipelineError(f"{recipe.file}: sensitivity: kl is not possible, {reason}. Set sensitivity: fisher.")
    model = model_digest(context.checkpoint, context.sources)
    windows = calibration_windows(WINDOWS[sensitivity], recipe.folder, context.checkpoint, model, store)
    model = digest(model, [(step.name, step.options.model_dump(mode="json")) for step in applied])
    if sensitivity == "kl":
        return OutputDivergence(graph, layers, problem.method, windows, model, store)
    # torch, which nothing else here needs
    from lowbit.pipeline.mixed_precision.sensitivity_fisher import Fisher
    from lowbit.pipeline.mixed_precision.sensitivity_output import OutputError

    kind = Fisher if sensitivity == "fisher" else OutputError
    return kind(graph, context.checkpoint, layers, problem.method, windows, model, store)
