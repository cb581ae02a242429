"""`allocate_bits` in a run: what its weights may take, what each choice takes and costs, and the recipe that follows."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from passes._blocks import BlockFormat
from passes._names import select
from passes._quantized import QuantizedWeight
from passes.allocate_bits import AllocateBits
from passes.methods.base import Method
from passes.methods.mse import Mse
from passes.quantize_matmul import find_matmuls
from pipeline.allocate import Allocation, allocate, resolved_steps, with_steps
from pipeline.calibration_text import calibration_windows
from pipeline.checkpoint import SIDE_FILES, Checkpoint
from pipeline.convert.mnn_tokenizer import tokenizer_bytes
from pipeline.convert.mnn_weights import MnnLayer
from pipeline.errors import PipelineError
from pipeline.export import is_decoder, load_graph
from pipeline.onnx_weights import stored_as_entry
from pipeline.plan import plan_of, unfolded_bytes
from pipeline.recipe import Calibrate, Recipe
from pipeline.report import megabytes
from pipeline.sensitivity import Layer, OutputDivergence, Progress, weight_errors
from pipeline.store import Store, digest
from pipeline.validate import too_large
from pipeline.weights import SourceDigests

WINDOWS = Calibrate(windows=8, window=256)
"""The text that damage is measured on: docstrings, never what `validate` measures on."""
GRAPH_BYTES = {"onnx": 10_000, "genai": 7_000, "mnn": 2_000}
"""What a graph takes at most for each quantized layer, beside 64 kB: measured on the demo are 7.8, 5.0 and 1.3 kB."""


@dataclass(frozen=True)
class Context:
    """What a run knows when it comes to its budget."""

    recipe: Recipe
    checkpoint: Checkpoint
    graph_file: Path
    model_digest: str
    store: Store
    sources: SourceDigests


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
    """The recipe with `allocate_bits`, its entry number `place`, replaced by what it chose; and remarks.

    Raises:
        PipelineError: the budget is too small, and what would be the smallest; or damage cannot be measured so.
    """
    recipe, step = context.recipe, context.recipe.passes[place]
    options = step.options
    assert isinstance(options, AllocateBits)
    graph = load_graph(context.graph_file, context.checkpoint)
    for before in recipe.passes[:place]:
        before.apply(graph)
    found = find_matmuls(graph)
    taken = {name for name in found if name not in select(list(found), options.include, options.exclude, also=set())}
    layers = [Layer(name, node, operand.weight) for name, (node, operand) in found.items() if name in taken]
    if not layers:
        raise PipelineError(f"{recipe.file}: include and exclude leave allocate_bits none of {len(found)} layers.")
    forms, method = options.forms(), _measurable(options.method)
    sizes = {(one.name, form): _size(recipe, one, form, method) for one in layers for form in forms}
    budget, fixed = _budget(context, place, graph, layers, sizes)
    damages = _damages(context, place, taken, forms, method, progress)
    grouped = [_grouped(options, values) for values in (damages, sizes)]
    try:
        solved = allocate(grouped[0], grouped[1], budget)
    except PipelineError as error:
        smallest = sum(min(sizes[one.name, form] for form in forms) for one in layers)
        least = _least(options, smallest, fixed, layers)
        raise PipelineError(
            f"{recipe.file}: {_asked(options)} cannot be met: {error}. The least is {least}: all weights at "
            f"{min(options.bits)} bits in blocks of {max(options.block_sizes)}, and {megabytes(fixed)} that no "
            "choice changes (embedding, norms, tokenizer, graph, layers that other passes take)."
        ) from error
    chosen = {one.name: solved.chosen[options.group_of(one.name)] for one in layers}
    return with_steps(recipe, place, resolved_steps(step, chosen)), _remarks(options, solved, chosen, layers)


def _measurable(method: Method) -> Method:
    return Mse() if method.calibrated else method


def _damages(
    context: Context, place: int, taken: set[str], forms: list[BlockFormat], method: Method, progress: Progress
) -> dict[tuple[str, BlockFormat], float]:
    """What the weights called `taken` cost in each form; all others are float meanwhile."""
    options = context.recipe.passes[place].options
    assert isinstance(options, AllocateBits)
    graph = load_graph(context.graph_file, context.checkpoint)
    applied = [step for step in context.recipe.passes[:place] if not step.name.startswith("quantize_")]
    for before in applied:  # float, so that one session runs it
        before.apply(graph)
    layers = [Layer(name, node, operand.weight) for name, (node, operand) in find_matmuls(graph).items() if name in taken]
    if options.sensitivity == "weight_mse":
        return weight_errors(layers, forms, method, context.sources, context.store, progress)
    if not is_decoder(context.checkpoint, context.recipe.export):
        raise PipelineError(f"{context.recipe.file}: sensitivity: kl needs a decoder; set sensitivity: weight_mse.")
    if (reason := too_large(context.checkpoint)) is not None:
        raise PipelineError(f"{context.recipe.file}: sensitivity: kl is not possible, {reason}. Set sensitivity: weight_mse.")
    windows = calibration_windows(WINDOWS, context.recipe.folder, context.checkpoint, context.model_digest, context.store)
    model = digest(context.model_digest, [(step.name, step.options.model_dump(mode="json")) for step in applied])
    divergence = OutputDivergence(graph, layers, windows, model, context.store)
    return divergence.measure(forms, method, progress)


def _size(recipe: Recipe, layer: Layer, form: BlockFormat, method: Method) -> int:
    """Bytes of a weight in the first hand-off's file, or in the ONNX file."""
    weight = QuantizedWeight(layer.name, layer.weight, form, method)
    target = recipe.convert[0] if recipe.convert else None
    if target is not None and target.target.startswith("mnn"):
        return sum(MnnLayer(stored_as_entry(weight, Path()), None, target.scale_dtype, 0).sizes)
    folded = target is not None and target.three_bit == "folded"
    return sum(part.nbytes for part in weight.parts.values()) + (unfolded_bytes(weight) if folded else 0)


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
        later.apply(graph)
    plan = plan_of(recipe, context.checkpoint, graph, context.store.root.parent)
    target = recipe.convert[0].target if recipe.convert else None
    whole = plan.hand_off_bytes()[target] if target else plan.onnx_bytes
    fixed = whole - sum(sizes[one.name, any_form] for one in layers) + _side_bytes(context, target, len(plan.weights))
    assert options.fit_bytes is not None
    return options.fit_bytes - fixed, fixed


def _side_bytes(context: Context, target: str | None, layers: int) -> int:
    """Tokenizer and configuration exactly, the graph at most."""
    kind = {None: "onnx", "onnxruntime-genai": "genai"}.get(target, "mnn")
    if target == "mnn-llm":
        side = len(tokenizer_bytes(context.checkpoint))
    else:
        side = sum(f.stat().st_size for name in SIDE_FILES if (f := context.checkpoint.folder / name).exists())
    return side + GRAPH_BYTES[kind] * layers + (64 << 10)


def _grouped(options: AllocateBits, values: dict[tuple[str, BlockFormat], Any]) -> dict[tuple[str, BlockFormat], Any]:
    """Sums over the layers of each group."""
    total: dict[tuple[str, BlockFormat], Any] = defaultdict(int)
    for (name, form), value in values.items():
        total[options.group_of(name), form] += value
    return dict(total)


def _asked(options: AllocateBits) -> str:
    return f"fit: {options.fit}" if options.fit else f"bits_per_weight: {options.bits_per_weight:g}"


def _least(options: AllocateBits, smallest: int, fixed: int, layers: list[Layer]) -> str:
    if options.fit:
        return megabytes(smallest + fixed)
    return f"{8 * smallest / sum(int(np.prod(one.weight.shape)) for one in layers):.3f}"


def _remarks(options: AllocateBits, solved: Allocation, chosen: dict[str, BlockFormat], layers: list[Layer]) -> list[str]:
    count = sum(int(np.prod(one.weight.shape)) for one in layers)
    kinds = Counter(f"{form.bits}/{form.block_size}" for form in chosen.values())
    what = "nats per token" if options.sensitivity == "kl" else "relative squared error, summed"
    return [
        f"{len(chosen)} weights in {megabytes(solved.size)}, {8 * solved.size / count:.3f} bits each",
        "bits/block: " + ", ".join(f"{number} x {kind}" for kind, number in sorted(kinds.items())),
        f"expected damage {solved.damage:.4g} ({what}), at most {solved.gap:.1%} above the least possible",
    ]
