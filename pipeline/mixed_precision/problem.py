"""`allocate_bits` in a recipe -> the problem that it stands for: layers, choices, their sizes, and the bytes left for them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from lowbit.passes.allocate_bits import AllocateBits
from lowbit.passes.graph.names import select
from lowbit.passes.methods.mse import Mse
from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quantize_matmul import find_matmuls
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.registry import make_target
from lowbit.pipeline.convert.sizes import Sizes
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.estimate.sizes import plan_of
from lowbit.pipeline.mixed_precision.budget import BudgetEntry, describe_budget
from lowbit.pipeline.mixed_precision.sensitivity import Layer
from lowbit.pipeline.recipe.recipe import PassEntry, Recipe
from lowbit.pipeline.report.units import megabytes
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests

GRAPH_BYTES = 64 << 10
"""What a graph takes at most, beside what it takes for each quantized layer."""
MOST_BITS = 9.0
"""More than 8 bits with their scales."""


@dataclass(frozen=True)
class Context:
    """What a run or a plan knows when it comes to its budget.

    Attributes:
        fresh_graph: makes the float graph, or a sketch of it that only has its matrices.
        sketched: whether it makes a sketch.
    """

    recipe: Recipe
    checkpoint: Checkpoint
    store: Store
    sources: SourceDigests
    fresh_graph: Callable[[], gs.Graph]
    sketched: bool = False

    def apply(self, step: PassEntry, graph: gs.Graph) -> None:
        """Apply a pass; to a sketch, only if sizes depend on it."""
        if not (self.sketched and step.options.keeps_shapes):
            step.apply(graph)


@dataclass(frozen=True)
class Problem:
    """What is to be allocated.

    Attributes:
        layers: that the entry takes.
        method: how codes are chosen while sensitivities are measured.
        sizes: bytes of every layer in every form.
        budget: bytes for all layers.
        fixed: bytes of the folder that no choice changes; 0 where the budget is bits per weight.
    """

    entry: BudgetEntry
    layers: list[Layer]
    forms: list[BlockFormat]
    method: Method
    sizes: dict[tuple[str, BlockFormat], int]
    budget: int
    fixed: int

    @property
    def options(self) -> AllocateBits:
        """Those of the entry."""
        return self.entry.options

    @property
    def count(self) -> int:
        """Weights of all layers."""
        return _count(self.layers)

    def bits(self, size: int) -> float:
        """Bits per weight if all layers together take `size` bytes."""
        return 8 * size / self.count

    @property
    def smallest(self) -> int:
        """Bytes of all layers, each in its smallest form."""
        return sum(min(self.sizes[layer.name, form] for form in self.forms) for layer in self.layers)

    @property
    def largest(self) -> int:
        """Bytes of all layers, each in its largest form."""
        return sum(max(self.sizes[layer.name, form] for form in self.forms) for layer in self.layers)


def build_problem(context: Context, entry: BudgetEntry) -> Problem:
    """What the budget of an entry leaves to which layers.

    Raises:
        PipelineError: it takes no layer, or there is nothing to choose.
    """
    recipe, options = context.recipe, entry.options
    graph = context.fresh_graph()
    for step in recipe.passes[: entry.position]:
        context.apply(step, graph)
    matmuls = find_matmuls(graph)
    others = select(list(matmuls), options.include, options.exclude, also=set())
    layers = [Layer(name, node, operand.weight) for name, (node, operand) in matmuls.items() if name not in others]
    if not layers:
        raise PipelineError(f"{recipe.file}: include and exclude leave allocate_bits none of {len(matmuls)} layers.")
    forms = options.forms()
    method = Mse() if options.method.calibrated else options.method
    weight_bytes = _folder_sizes(context).weight
    sizes = {
        (layer.name, form): weight_bytes(QuantizedWeight(layer.name, layer.weight, form, method))
        for layer in layers
        for form in forms
    }
    budget, fixed = _budget(context, entry, graph, layers, sizes)
    problem = Problem(entry, layers, forms, method, sizes, budget, fixed)
    if problem.bits(budget) > MOST_BITS:
        raise PipelineError(
            f"{recipe.file}: {describe_budget(options)} is {problem.bits(budget):.1f} bits for each weight; at 8 bits in "
            f"blocks of 32 all of it takes {megabytes(int(MOST_BITS * problem.count / 8) + fixed)}. Ask for less."
        )
    return problem


def _count(layers: list[Layer]) -> int:
    return sum(math.prod(layer.weight.shape) for layer in layers)


def _folder_sizes(context: Context) -> Sizes:
    """Of the first hand-off's folder, or of the ONNX model's."""
    recipe, checkpoint = context.recipe, context.checkpoint
    return make_target(recipe.convert[0], checkpoint).sizes() if recipe.convert else Sizes(checkpoint)


def _budget(
    context: Context, entry: BudgetEntry, graph: gs.Graph, layers: list[Layer], sizes: dict[tuple[str, BlockFormat], int]
) -> tuple[int, int]:
    """Bytes that the weights may take, and bytes of all the rest."""
    recipe, options = context.recipe, entry.options
    if options.bits_per_weight is not None:
        return int(options.bits_per_weight * _count(layers) / 8), 0
    any_form = options.forms()[0]
    steps = entry.build_entries({layer.name: any_form for layer in layers})
    for step in (*steps, *recipe.passes[entry.position + 1 :]):
        context.apply(step, graph)
    plan = plan_of(recipe, context.checkpoint, graph, context.store)
    whole = plan.hand_off_bytes[recipe.convert[0].target] if recipe.convert else plan.onnx_bytes
    folder = _folder_sizes(context)
    rest = folder.side_files() + folder.graph_per_layer * len(plan.weights) + GRAPH_BYTES
    fixed = whole - sum(sizes[layer.name, any_form] for layer in layers) + rest
    assert options.fit_bytes is not None  # AllocateBits has one of the two
    return options.fit_bytes - fixed, fixed
