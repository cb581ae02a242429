"""A graph and text -> quantized weights, subgraph by subgraph, each chosen for the inputs that it gets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from threadpoolctl import threadpool_limits

from lowbit.passes.graph.names import LAYER
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.calibrate.activations import PairedActivations
from lowbit.pipeline.calibrate.correction import Correction
from lowbit.pipeline.calibrate.saved_states import SavedStates
from lowbit.pipeline.calibrate.subgraphs import PartitionedGraph
from lowbit.pipeline.onnx_io.entry import write_entry
from lowbit.pipeline.recipe.sections import Calibrate
from lowbit.pipeline.runtime.session import weight_folder
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.store.store import Entry, Store
from lowbit.pipeline.store.weight_keys import SourceDigests, weight_key

LIBRARIES = ("numba", "numpy", "onnxruntime")
Report = Callable[[float, str], None]


@dataclass
class Calibrated:
    """What calibration left behind: the entry of every weight that it quantized or recalled, and how many it quantized."""

    entries: dict[QuantizedWeight, Entry] = field(default_factory=dict)
    made: int = 0


@dataclass(frozen=True)
class Key:
    """What a subgraph depends on: everything before it (`chain`), and each of its weights."""

    chain: str
    weights: dict[QuantizedWeight, str]


def calibrate(
    graph: gs.Graph, options: Calibrate, windows: npt.NDArray[np.int64], sources: SourceDigests, store: Store, report: Report
) -> Calibrated:
    """Quantize every weight of `graph` up to the last one with a calibrated method, or recall it.

    Args:
        graph: the finished graph, its quantized weights still lazy; it is not changed.
        windows: int64 [windows, tokens].
        report: gets the share done and the time left.

    Weights come subgraph by subgraph, so that each sees the inputs that its quantized predecessors make. Both models' states
    are saved between layers as they are: a run that was stopped goes on with the very numbers it had.
    """
    partitioned = PartitionedGraph(graph, weight_folder(graph))
    keys = _keys(partitioned, options, windows, sources)
    weight_keys = {weight: key for subgraph in keys for weight, key in subgraph.weights.items()}
    entries = {weight: entry for weight, key in weight_keys.items() if (entry := store.get(key)) is not None}
    calibrated = Calibrated(entries, len(weight_keys) - len(entries))
    if not calibrated.made:
        return calibrated
    work = [sum(p.weight.source.nbytes for p in subgraph.products) for subgraph in partitioned.subgraphs[: len(keys)]]
    begun = time.monotonic()
    with threadpool_limits(1, "blas"), store.scratch() as scratch:
        states = SavedStates(store.local, [key.chain for key in keys])
        unfinished = next(number for number, key in enumerate(keys) if not key.weights.keys() <= entries.keys())
        first, activations = states.load(partitioned, scratch, unfinished) or (
            0,
            PairedActivations.begin(partitioned, scratch, windows),
        )
        for number in range(first, len(keys)):
            if number > first and states.due() and _opens_layer(partitioned, number):
                states.save(number, activations)
            activations.run(number)
            asymmetric = options.asymmetric and number > 0  # nothing was quantized before the first subgraph
            _quantize(activations, number, keys[number], store, entries, asymmetric)
            activations.release(number)
            done = sum(work[first : number + 1]) / sum(work[first:])
            report(done, f"{(time.monotonic() - begun) * (1 - done) / done:,.0f} s left")
    states.remove()
    return calibrated


def _quantize(
    activations: PairedActivations, number: int, key: Key, store: Store, entries: dict[QuantizedWeight, Entry], asymmetric: bool
) -> None:
    """Make what is missing of a subgraph, and let both models multiply by it."""
    partitioned = activations.partitioned
    products, later = partitioned.subgraphs[number].products, partitioned.read_after(number)
    for x in dict.fromkeys(product.x for product in products):
        readers = [product for product in products if product.x == x]
        missing = [product for product in readers if product.weight not in entries]
        hessian, drift = None, None
        if any(product.weight.method.calibrated for product in missing):
            hessian, drift = activations.moments(x), activations.drift(x) if asymmetric else None
        for product in missing:
            weight = product.weight
            if hessian is not None and weight.method.calibrated:
                target = None if drift is None else Correction(drift, hessian)
                weight = replace(weight, hessian=hessian, target=target)
            entries[product.weight] = store.put(key.weights[product.weight], partial(write_entry, weight))
        for product in readers:
            if product.y in later:
                activations.multiply_exact(product)
                activations.multiply_quantized(product, entries[product.weight])


def _keys(
    partitioned: PartitionedGraph, options: Calibrate, windows: npt.NDArray[np.int64], sources: SourceDigests
) -> list[Key]:
    """The key of every subgraph up to the last one with a calibrated method: known before anything is run."""
    subgraphs = partitioned.subgraphs
    calibrated = [i for i, subgraph in enumerate(subgraphs) if any(p.weight.method.calibrated for p in subgraph.products)]
    last = max(calibrated, default=-1)
    chain = digest(windows.tolist(), options.asymmetric, source_digest(calibrate), versions(LIBRARIES))
    keys: list[Key] = []
    for number, subgraph in enumerate(subgraphs[: last + 1]):
        before = sorted(keys[-1].weights.values()) if keys else []
        chain = digest(chain, partitioned.digest(number, sources.of), before)
        plain = {product.weight: weight_key(product.weight, sources.of(product.weight.source)) for product in subgraph.products}
        keys.append(Key(chain, {w: digest(chain, key) if w.method.calibrated else key for w, key in plain.items()}))
    return keys


def _opens_layer(partitioned: PartitionedGraph, number: int) -> bool:
    """Whether a subgraph is the first of a decoder layer, where the fewest tensors are carried."""
    before, here = ({_layer(p.weight.name) for p in partitioned.subgraphs[i].products} for i in (number - 1, number))
    return before != here


def _layer(name: str) -> str | None:
    layer = LAYER.search(name)
    return layer.group(1) if layer else None
