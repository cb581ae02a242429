"""What a recipe makes of a graph's weights: sizes in every engine's file, disk, memory and time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from lowbit.passes.graph.names import LAYER
from lowbit.passes.graph.quantized_ops import quantized_weight
from lowbit.passes.quant.quantized_weight import Part, QuantizedWeight
from lowbit.passes.quant.weights import Weight
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.registry import make_target
from lowbit.pipeline.convert.sizes import Sizes
from lowbit.pipeline.estimate.duration import expected_seconds
from lowbit.pipeline.export.support import is_decoder
from lowbit.pipeline.recipe.edit import plain_steps
from lowbit.pipeline.recipe.recipe import Recipe
from lowbit.pipeline.runtime.memory import too_large
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests, weight_key

BASE_MEMORY = 600_000_000
"""Interpreter, libraries and buffers; measured with `make bench`, which prints the whole peak."""


@dataclass(frozen=True)
class Planned:
    """One weight of the result: what it becomes, its bytes, and whether it is made already."""

    weight: QuantizedWeight
    onnx_bytes: int
    cached: bool


@dataclass(frozen=True)
class Plan:
    """What a run would make. Sizes are of weights; graphs and tokenizers add little.

    Attributes:
        float_bytes: weights that stay as they are (norms, biases, a float embedding), in every model.
        hand_off_bytes: size of every hand-off of the recipe, by target.
        source_bytes: what would be read.
        hidden_size: of the model.
        checkpoint: what it starts from.
        steps: names of the steps that a run would execute, where they were listed.
    """

    recipe: Recipe
    weights: tuple[Planned, ...]
    float_bytes: int
    hand_off_bytes: dict[str, int]
    source_bytes: int
    hidden_size: int
    checkpoint: Checkpoint
    steps: tuple[str, ...] = ()

    @property
    def onnx_bytes(self) -> int:
        return self.float_bytes + sum(one.onnx_bytes for one in self.weights)

    @property
    def disk_bytes(self) -> int:
        """What the build folder's disk must have free: codes not made yet, the reference's states, and both results."""
        codes = sum(one.onnx_bytes for one in self.weights if not one.cached)
        states = (
            4 * self.hidden_size * self.recipe.validate.windows * self.recipe.validate.window if self.recipe.validate else 0
        )
        plain = 2 * self.onnx_bytes if self._measures_plain() else 0  # once in the store, once as a model
        return codes + states + self._activations() + plain + self.onnx_bytes + sum(self.hand_off_bytes.values())

    def _measures_plain(self) -> bool:
        """Whether a run measures plain rounding, too."""
        decoder = is_decoder(self.checkpoint, self.recipe.export)
        wanted = self.recipe.validate is not None and decoder and bool(plain_steps(self.recipe))
        return wanted and too_large(self.checkpoint) is None

    @property
    def memory_bytes(self) -> int:
        """About the peak that cannot be paged out: measured constants times the largest block of layers.

        Without validation the widest moment is a block of the quantized model in onnxruntime, with validation one of
        the float model, its weights in bf16, in fp32 and transposed, and a window of logits of both models.
        """
        block = self._largest_block()
        inputs = max((one.weight.source.shape[1] for one in self.weights if one.weight.method.calibrated), default=0)
        looking = 9 * inputs**2  # their second moments and the factor of those, and some rows of weights
        if self.recipe.validate is None:
            return BASE_MEMORY + max(3 * block, looking)
        vocabulary = max(one.weight.source.shape[0] for one in self.weights)
        return BASE_MEMORY + max(10 * block + 12 * self.recipe.validate.window * vocabulary, looking)

    @property
    def seconds(self) -> float:
        """About how long the run takes, on the machine that pipeline/estimate/duration.py was measured on."""
        weights = [(one.weight.method_name, math.prod(one.weight.source.shape), one.cached) for one in self.weights]
        return expected_seconds(self.recipe, weights)

    def _largest_block(self) -> int:
        return self._largest(lambda n, k: n * k)

    def _activations(self) -> int:
        """Bytes of both models' outputs within a layer, and how far the widest input has drifted: what calibration spills."""
        options = self.recipe.calibrate
        if options is None or all(one.cached or not one.weight.method.calibrated for one in self.weights):
            return 0
        widest = max(one.weight.source.shape[1] for one in self.weights)
        return options.windows * options.window * (8 * self._largest(lambda n, _: n) + 4 * widest)

    def _largest(self, size: Callable[[int, int], int]) -> int:
        """The largest sum of `size` of the shapes [N, K] in one layer."""
        sizes: Counter[str] = Counter()
        for one in self.weights:
            found = LAYER.search(one.weight.name)
            sizes[found.group(1) if found else ""] += size(*one.weight.source.shape)
        del sizes[""]
        return max(sizes.values(), default=0)

    @property
    def bits_per_weight(self) -> float:
        count = sum(one.weight.source.shape[0] * one.weight.source.shape[1] for one in self.weights)
        return 8 * sum(one.onnx_bytes for one in self.weights) / count if count else 0.0


def plan_of(recipe: Recipe, checkpoint: Checkpoint, graph: gs.Graph, store: Store) -> Plan:
    """The plan of a graph that the recipe's passes were applied to; no weight is read."""
    sources = SourceDigests(store)
    found = [weight for node in graph.nodes if (weight := quantized_weight(node)) is not None]
    onnx = Sizes(checkpoint)
    weights = tuple(
        Planned(
            weight,
            onnx.weight(weight),
            (digest := sources.known(weight.source)) is not None and store.has(weight_key(weight, digest)),
        )
        for weight in found
    )
    kept = {
        t.name: t._values.nbytes
        for t in graph.tensors().values()
        if isinstance(t, gs.Constant) and isinstance(t._values, Weight) and not isinstance(t._values, Part)
    }
    small = sum(w.nbytes for w in checkpoint.weights.values() if len(w.shape) < 2)
    floats = sum(kept.values()) + small
    engines = {options.target: make_target(options, checkpoint).sizes() for options in recipe.convert}
    hand_offs = {name: floats + sizes.tables() + sum(map(sizes.weight, found)) for name, sizes in engines.items()}
    source = sum(w.nbytes for w in checkpoint.weights.values())
    return Plan(recipe, weights, floats, hand_offs, source, int(checkpoint.config.get("hidden_size", 0)), checkpoint)
