"""Quantized MatMuls -> the same function, their inputs' channels scaled so that rounding spares those that matter most."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import onnx_graphsurgeon as gs
from pydantic import Field

from lowbit.passes.base import Outcome, Pass, PassError, Phase
from lowbit.passes.graph.decoder import VIEWS, Norm, find_plain_norms
from lowbit.passes.graph.match import Bias, before_bias, behind, producer, readers
from lowbit.passes.graph.quantized_ops import quantized_matmuls, quantized_weight, replace_weight
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.scaled_weight import ChannelScale, ScaledWeight
from lowbit.passes.quant.weights import weight_of


class FoldChannelScales(Pass):
    """AWQ's scales (Lin et al., arXiv:2306.00978): columns of important inputs grow before they are rounded.

    What makes the inputs is divided by the same scales, so nothing of it is left at run time: a norm's weight, the rows of
    v_proj (through attention, one scale for all heads of a group) or of up_proj (through the product with the gate). A scale
    is mean(|x|)^ratio, its ratio that of least output error after rounding to nearest, searched on the text of
    `calibrate:`. Comes after quantize_matmul, whose bits and blocks it needs, and serves any method.
    """

    ratios: Annotated[int, Field(ge=2)] = 20
    """How many exponents from 0 to 1 are tried; 0 leaves everything as it is."""

    @property
    def phases(self) -> frozenset[Phase]:
        return frozenset({"scaling"})

    @property
    def plain(self) -> None:
        return None

    @property
    def keeps_shapes(self) -> bool:
        return True

    def apply(self, graph: gs.Graph) -> Outcome:
        nodes = [node for node, _ in quantized_matmuls(graph)]
        if not nodes:
            raise PassError("no quantized MatMul found; put quantize_matmul before it.")
        norms = {id(norm.y): norm for norm in find_plain_norms(graph)}
        rewritten: list[str] = []
        skipped: dict[str, str] = {}
        for x in {id(x): x for node in nodes for x in [behind(node.inputs[0])]}.values():
            reading = [node for node in readers(x) if node.op != "Shape"]
            weights = [(node, weight) for node in reading if (weight := quantized_weight(node)) is not None]
            names = [weight.name for _, weight in weights]
            if len(weights) < len(reading):
                reason = "something else reads the same input"
            else:
                scale = self._fold(graph, norms.get(id(x)), x, int(reading[0].attrs["K"]))
                reason = "its input is made by no norm, and by no layer that scales pass through" if scale is None else ""
            if reason:
                skipped |= dict.fromkeys(names, reason)
                continue
            rewritten += names
            for node, weight in weights:
                _scale(node, weight, read=scale)
        if not rewritten:
            raise PassError(f"nothing to fold: {next(iter(skipped))}: {next(iter(skipped.values()))}.")
        return Outcome(tuple(rewritten), skipped)

    def _fold(self, graph: gs.Graph, norm: Norm | None, x: gs.Tensor, channels: int) -> ChannelScale | None:
        """Divide what makes the channels of `x` by a new scale; None if nothing does that can be divided."""
        if norm is not None:
            (scaled,) = readers(norm.gamma)
            scale = ChannelScale(norm.gamma.name.removesuffix(".weight"), channels, self.ratios)
            _divide(scaled, next(i for i, t in enumerate(scaled.inputs) if behind(t) is norm.gamma), scale)
            return scale
        if (writer := _gated(x) or _attended(graph, x)) is None:
            return None
        linear, weight, bias, head_dim = writer
        size = int(linear.attrs["N"])
        if channels % size:
            return None
        scale = ChannelScale(weight.name, size, self.ratios, head_dim or size, channels // size)
        _scale(linear, weight, written=scale)
        if bias is not None:
            _divide(bias.node, bias.place, scale)
        return scale


_Linear = tuple[gs.Node, QuantizedWeight, Bias | None]
"""A quantized MatMul, its weight and its bias."""


def _scale(
    node: gs.Node, weight: QuantizedWeight, read: ChannelScale | None = None, written: ChannelScale | None = None
) -> None:
    """Let a quantized MatMul multiply by its weight with scaled columns or rows."""
    replace_weight(node, weight, replace(weight, source=ScaledWeight(weight.source, read, written)))


def _divide(node: gs.Node, place: int, scale: ChannelScale) -> None:
    """Divide a one-dimensional constant that a node reads."""
    constant = behind(node.inputs[place])
    node.inputs[place] = gs.Constant(constant.name, ScaledWeight(weight_of(constant), written=scale))


def _gated(x: gs.Tensor) -> tuple[*_Linear, None] | None:
    """The layer whose output is multiplied with a gate to make `x`, and is read by nothing else."""
    product = producer(x)
    if product is None or product.op != "Mul":
        return None
    factors = [(t, linear) for t in map(behind, product.inputs) if (linear := _linear(t)) is not None]
    if len(factors) != 1 or [id(reader) for reader in readers(factors[0][0])] != [id(product)]:
        return None
    return *factors[0][1], None


def _attended(graph: gs.Graph, x: gs.Tensor) -> tuple[*_Linear, int] | None:
    """The layer that makes the values which attention averages to `x`, behind the cache, and the size of a head."""
    average = producer(behind(x, VIEWS))
    cache = producer(behind(average.inputs[1], VIEWS)) if average is not None and average.op == "MatMul" else None
    if cache is None or cache.op != "Concat":
        return None
    past = behind(cache.inputs[0])
    linear = _linear(behind(cache.inputs[1], VIEWS))
    if linear is None or past not in graph.inputs or not past.name.endswith(".value"):
        return None
    return *linear, int(past.shape[3])


def _linear(tensor: gs.Tensor) -> _Linear | None:
    """The quantized MatMul that makes a tensor, its bias added or not."""
    node, bias = before_bias(tensor)
    weight = None if node is None else quantized_weight(node)
    return None if node is None or weight is None else (node, weight, bias)
