"""`allocate_bits` in a run: what its weights may take, what each choice takes and costs, and the recipe that follows."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from lowbit.passes.allocate_bits import AllocateBits
from lowbit.passes.graph.names import select
from lowbit.passes.methods.mse import Mse
from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quantize_matmul import find_matmuls
from lowbit.pipeline.calibrate.dataset import calibration_windows
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.registry import make_target
from lowbit.pipeline.convert.sizes import Sizes
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.estimate.sizes import plan_of
from lowbit.pipeline.export.support import is_decoder
from lowbit.pipeline.mixed_precision.device_times import device_times
from lowbit.pipeline.mixed_precision.sensitivity import Damages, Layer, Progress, Sensitivity, WeightError
from lowbit.pipeline.mixed_precision.sensitivity_kl import OutputDivergence
from lowbit.pipeline.mixed_precision.solver import Allocation, Costs, allocate, resolved_steps
from lowbit.pipeline.recipe.edit import with_steps
from lowbit.pipeline.recipe.recipe import Recipe, Step
from lowbit.pipeline.recipe.sections import Calibrate
from lowbit.pipeline.report.units import megabytes
from lowbit.pipeline.runtime.memory import too_large
from lowbit.pipeline.store.digests import digest
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests, model_digest

WINDOWS = {"kl": Calibrate(windows=8, window=256), "fisher": Calibrate(windows=32, window=64)}
"""The text that damage is measured on: docstrings, never what `validate` measures on. Many short windows suit `fisher`, which
has one sample of the gradient from each; on the demo it is within 18% (standard deviation) of `kl`, weight by weight."""
GRAPH_BYTES = 64 << 10
"""What a graph takes at most, beside what it takes for each quantized layer."""
MOST_BITS = 9.0
"""More than 8 bits with their scales."""


@dataclass(frozen=True)
class Context:
    """What a run or a plan knows when it comes to its budget.

    Attributes:
        fresh_graph: makes the float graph, or a sketch of it that only has its matrices.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    store: Store
    sources: SourceDigests
    fresh_graph: Callable[[], gs.Graph]
    sketched: bool = False

    def apply(self, step: Step, graph: gs.Graph) -> None:
        """Apply a pass; to a sketch, only if sizes depend on it."""
        if not (self.sketched and step.options.keeps_shapes):
            step.apply(graph)


@dataclass(frozen=True)
class Question:
    """What is to be allocated.

    Attributes:
        layers: that the pass takes.
        sizes: bytes of every layer in every form.
        budget: bytes for all layers.
        fixed: bytes of the folder that no choice changes; 0 where the budget is bits per weight.
    """

    options: AllocateBits
    layers: list[Layer]
    forms: list[BlockFormat]
    method: Method
    sizes: dict[tuple[str, BlockFormat], int]
    budget: int
    fixed: int

    @property
    def count(self) -> int:
        """Weights of all layers."""
        return sum(int(np.prod(one.weight.shape)) for one in self.layers)


def budget_place(recipe: Recipe) -> int | None:
    """The number of the entry that is `allocate_bits`, if there is one.

    Raises:
        PipelineError: there are several.
    """
    places = [i for i, step in enumerate(recipe.passes) if isinstance(step.options, AllocateBits)]
    if len(places) > 1:
        raise PipelineError(f"{recipe.file}: allocate_bits is there {len(places)} times; one budget goes for all weights.")
    return places[0] if places else None


def resolve_budget(context: Context, place: int, progress: Progress) -> tuple[Recipe, list[str]]:
    """The recipe with `allocate_bits`, its entry number `place`, replaced by what it chose, and remarks.

    Raises:
        PipelineError: the budget is too small, and what would be the smallest; or damage cannot be measured so.
    """
    asked = ask(context, place)
    solved, chosen = answer(context, asked, measure(context, place, asked, progress))
    recipe = with_steps(context.recipe, place, resolved_steps(context.recipe.passes[place], chosen))
    return recipe, _remarks(asked, solved, chosen)


def planned_budget(context: Context, place: int) -> Recipe:
    """`resolve_budget` by what was measured before; nothing is run.

    Raises:
        PipelineError: something was not measured yet.
    """
    asked = ask(context, place)
    if (damages := known_damages(context, place, asked)) is None:
        raise PipelineError(
            f"{context.recipe.file}: what each weight costs was not measured yet, so nobody can say which bits it gets. "
            f"`lowbit frontier {context.recipe.name}` measures it, and so does a run; then plan shows the choice."
        )
    _, chosen = answer(context, asked, damages)
    return with_steps(context.recipe, place, resolved_steps(context.recipe.passes[place], chosen))


def ask(context: Context, place: int) -> Question:
    """What the recipe's budget leaves to which layers.

    Raises:
        PipelineError: it takes none, or there is nothing to choose.
    """
    recipe, step = context.recipe, context.recipe.passes[place]
    options = step.options
    assert isinstance(options, AllocateBits)
    graph = context.fresh_graph()
    for before in recipe.passes[:place]:
        context.apply(before, graph)
    found = find_matmuls(graph)
    taken = {name for name in found if name not in select(list(found), options.include, options.exclude, also=set())}
    layers = [Layer(name, node, operand.weight) for name, (node, operand) in found.items() if name in taken]
    if not layers:
        raise PipelineError(f"{recipe.file}: include and exclude leave allocate_bits none of {len(found)} layers.")
    forms, method = options.forms(), _measurable(options.method)
    weight_bytes = _sizes(context).weight
    sizes = {
        (one.name, form): weight_bytes(QuantizedWeight(one.name, one.weight, form, method)) for one in layers for form in forms
    }
    budget, fixed = _budget(context, place, graph, layers, sizes)
    asked = Question(options, layers, forms, method, sizes, budget, fixed)
    if 8 * budget > MOST_BITS * asked.count:
        raise PipelineError(
            f"{recipe.file}: {_asked(options)} is {8 * budget / asked.count:.1f} bits for each weight; at 8 bits in blocks "
            f"of 32 all of it takes {megabytes(int(MOST_BITS * asked.count / 8) + fixed)}. Ask for less."
        )
    return asked


def measure(context: Context, place: int, asked: Question, progress: Progress) -> Damages:
    """What every choice costs; what was measured before is recalled."""
    return _sensitivity(context, place, asked).measure(asked.forms, progress)


def known_damages(context: Context, place: int, asked: Question) -> Damages | None:
    """What every choice costs, if all of it was measured before."""
    weights = context.checkpoint.weights.values()
    if not all(context.sources.known(weight) is not None for weight in weights):
        return None
    return _sensitivity(context, place, asked).known(asked.forms)


def answer(
    context: Context, asked: Question, damages: Damages, budget: int | None = None
) -> tuple[Allocation, dict[str, BlockFormat]]:
    """The choice for each group of layers, and for each layer.

    Args:
        budget: bytes, instead of the recipe's own.

    Raises:
        PipelineError: it cannot be met, and what is the least.
    """
    options = asked.options
    times, longest = _times(context, asked)
    costs = Costs(*(_grouped(options, values) for values in (damages, asked.sizes, times)))
    try:
        solved = allocate(costs, asked.budget if budget is None else budget, longest)
    except PipelineError as error:
        smallest = sum(min(asked.sizes[one.name, form] for form in asked.forms) for one in asked.layers)
        least = megabytes(smallest + asked.fixed) if options.fit else f"{8 * smallest / asked.count:.3f}"
        raise PipelineError(
            f"{context.recipe.file}: {_asked(options)} cannot be met: {error}. The least is {least}: all weights at "
            f"{min(options.bits)} bits in blocks of {max(options.block_sizes)}, and {megabytes(asked.fixed)} that no "
            "choice changes (embedding, norms, tokenizer, graph, layers that other passes take)."
        ) from error
    return solved, {one.name: solved.chosen[options.group_of(one.name)] for one in asked.layers}


def _times(context: Context, asked: Question) -> tuple[dict[tuple[str, BlockFormat], float], float | None]:
    """What each layer takes in each form, relative to all of them at 4 bits, and what all may take."""
    options = asked.options
    if options.target is None:
        return {}, None
    cost = device_times(options.target, context.recipe.folder).relative(options.bits)
    times = {
        (one.name, form): cost[form.bits] * int(np.prod(one.weight.shape)) / asked.count
        for one in asked.layers
        for form in asked.forms
    }
    return times, options.max_relative_time


def _measurable(method: Method) -> Method:
    return Mse() if method.calibrated else method


def _sensitivity(context: Context, place: int, asked: Question) -> Sensitivity:
    """How damage is measured: one weight is quantized, all others are float."""
    options, recipe = asked.options, context.recipe
    graph = context.fresh_graph()
    applied = [step for step in recipe.passes[:place] if not step.name.startswith("quantize_")]
    for before in applied:
        context.apply(before, graph)
    taken = {one.name for one in asked.layers}
    layers = [Layer(name, node, operand.weight) for name, (node, operand) in find_matmuls(graph).items() if name in taken]
    if options.sensitivity == "weight_mse":
        return WeightError(layers, asked.method, context.sources, context.store)
    if not is_decoder(context.checkpoint, recipe.export):
        raise PipelineError(f"{recipe.file}: sensitivity: {options.sensitivity} needs a decoder; set sensitivity: weight_mse.")
    if options.sensitivity == "kl" and (reason := too_large(context.checkpoint)) is not None and not context.sketched:
        raise PipelineError(f"{recipe.file}: sensitivity: kl is not possible, {reason}. Set sensitivity: fisher.")
    model = model_digest(context.checkpoint, context.sources)
    text = WINDOWS["kl" if options.sensitivity == "kl" else "fisher"]
    windows = calibration_windows(text, recipe.folder, context.checkpoint, model, context.store)
    model = digest(model, [(step.name, step.options.model_dump(mode="json")) for step in applied])
    if options.sensitivity == "kl":
        return OutputDivergence(graph, layers, asked.method, windows, model, context.store)
    from lowbit.pipeline.mixed_precision.sensitivity_fisher import Fisher, OutputError  # torch, which nothing else here needs

    kind = Fisher if options.sensitivity == "fisher" else OutputError
    return kind(graph, context.checkpoint, layers, asked.method, windows, model, context.store)


def _sizes(context: Context) -> Sizes:
    """Of the first hand-off's folder, or of the ONNX model's."""
    recipe, checkpoint = context.recipe, context.checkpoint
    return make_target(recipe.convert[0], checkpoint).sizes() if recipe.convert else Sizes(checkpoint)


def _budget(
    context: Context, place: int, graph: gs.Graph, layers: list[Layer], sizes: dict[tuple[str, BlockFormat], int]
) -> tuple[int, int]:
    """Bytes that the weights may take, and bytes of all the rest."""
    step, recipe = context.recipe.passes[place], context.recipe
    options = step.options
    assert isinstance(options, AllocateBits)
    if options.bits_per_weight is not None:
        count = sum(int(np.prod(one.weight.shape)) for one in layers)
        return int(options.bits_per_weight * count / 8), 0
    any_form = options.forms()[0]
    for later in (*resolved_steps(step, {one.name: any_form for one in layers}), *recipe.passes[place + 1 :]):
        context.apply(later, graph)
    plan = plan_of(recipe, context.checkpoint, graph, context.store)
    whole = plan.hand_off_bytes[recipe.convert[0].target] if recipe.convert else plan.onnx_bytes
    folder = _sizes(context)
    rest = folder.side_files() + folder.graph_per_layer * len(plan.weights) + GRAPH_BYTES
    fixed = whole - sum(sizes[one.name, any_form] for one in layers) + rest
    assert options.fit_bytes is not None
    return options.fit_bytes - fixed, fixed


def _grouped(options: AllocateBits, values: dict[tuple[str, BlockFormat], Any]) -> dict[tuple[str, BlockFormat], Any]:
    """Sums over the layers of each group."""
    total: dict[tuple[str, BlockFormat], Any] = defaultdict(int)
    for (name, form), value in values.items():
        total[options.group_of(name), form] += value
    return dict(total)


def _asked(options: AllocateBits) -> str:
    return f"fit: {options.fit}" if options.fit else f"bits_per_weight: {options.bits_per_weight:g}"


def _remarks(asked: Question, solved: Allocation, chosen: dict[str, BlockFormat]) -> list[str]:
    kinds = Counter(f"{form.bits}/{form.block_size}" for form in chosen.values())
    what = "nats per token" if asked.options.sensitivity in ("kl", "fisher") else "relative squared error, summed"
    found = [
        f"{len(chosen)} weights in {megabytes(solved.size)}, {8 * solved.size / asked.count:.3f} bits each",
        "bits/block: " + ", ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items())),
        f"expected damage {solved.damage:.4g} ({what}), at most {solved.gap:.1%} above the least possible",
    ]
    if solved.time is not None:
        found.append(f"expected to decode in {solved.time:.2f} of the time that 4 bits take on {asked.options.target}")
    return found
