"""`calibrate:` both models read text, stage by stage, and each layer is quantized for the inputs that it gets."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from threadpoolctl import threadpool_limits

from lowbit.passes.graph.names import LAYER
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.calibrate.activations import CorrectedWeight, SideBySide
from lowbit.pipeline.calibrate.subgraphs import Stages
from lowbit.pipeline.onnx_io.stream import write_entry
from lowbit.pipeline.recipe.sections import Calibrate
from lowbit.pipeline.runtime.session import weight_folder
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.store.store import Entry, Store
from lowbit.pipeline.store.weight_keys import SourceDigests, weight_key

SAVE_SECONDS = 60.0
"""Hidden states are saved once this much work would be lost without them."""
LIBRARIES = ("numba", "numpy", "onnxruntime")
Report = Callable[[float, str], None]


@dataclass
class Calibrated:
    """What calibration left behind: the entry of every weight that it quantized or recalled, and how many it quantized."""

    entries: dict[QuantizedWeight, Entry] = field(default_factory=dict)
    made: int = 0


@dataclass(frozen=True)
class Key:
    """What a stage depends on: everything before it (`chain`), and each of its weights."""

    chain: str
    weights: dict[QuantizedWeight, str]


def calibrate(
    graph: gs.Graph, options: Calibrate, windows: np.ndarray, sources: SourceDigests, store: Store, report: Report
) -> Calibrated:
    """Quantize every weight of `graph` up to the last one with a calibrated method, or recall it.

    Args:
        graph: the finished graph, its quantized weights still lazy; it is not changed.
        windows: int64 [windows, tokens].
        report: gets the share done and the time left.

    Weights come stage by stage, so that each sees the inputs that its quantized predecessors make. Both models' states are
    saved between layers as they are: a run that was stopped goes on with the very numbers it had.
    """
    stages = Stages(graph, weight_folder(graph))
    keys = _keys(stages, options, windows, sources)
    wanted = {weight: key for one in keys for weight, key in one.weights.items()}
    known = {weight: entry for weight, key in wanted.items() if (entry := store.get(key)) is not None}
    found = Calibrated(known, len(wanted) - len(known))
    if not found.made:
        return found
    work = [sum(p.weight.source.nbytes for p in stage.products) for stage in stages.stages[: len(keys)]]
    begun = last_save = time.monotonic()
    with threadpool_limits(1, "blas"), store.scratch() as scratch:
        first, both, saved = _resume(stages, scratch, keys, store, windows, known)
        for number in range(first, len(keys)):
            if number > first and time.monotonic() - last_save > SAVE_SECONDS and _opens_layer(stages, number):
                kept = store.local.put(_states_key(keys[number]), both.save)
                if saved is not None:
                    store.local.remove(saved)
                saved, last_save = kept, time.monotonic()
            both.run(number)
            asymmetric = options.asymmetric and number > 0  # nothing was quantized before the first stage
            _quantize(both, number, keys[number], store, known, asymmetric)
            both.release(number)
            done = sum(work[first : number + 1]) / sum(work[first:])
            report(done, f"{(time.monotonic() - begun) * (1 - done) / done:,.0f} s left")
    if saved is not None:
        store.local.remove(saved)
    return found


def _quantize(
    both: SideBySide, number: int, key: Key, store: Store, known: dict[QuantizedWeight, Entry], asymmetric: bool
) -> None:
    """Make what is not known of a stage, and let both models multiply by it."""
    products, later = both.stages.stages[number].products, both.stages.read_after(number)
    for x in dict.fromkeys(product.x for product in products):
        readers = [product for product in products if product.x == x]
        missing = [product for product in readers if product.weight not in known]
        hessian, drift = None, None
        if any(product.weight.method.calibrated for product in missing):
            hessian, drift = both.moments(x), both.drift(x) if asymmetric else None
        for product in missing:
            ready = product.weight
            if hessian is not None and ready.method.calibrated:
                target = None if drift is None else CorrectedWeight(ready.source, drift, hessian)
                ready = replace(ready, hessian=hessian, target=target)
            known[product.weight] = store.put(key.weights[product.weight], partial(write_entry, ready))
        for product in readers:
            if product.y in later:
                both.multiply_exact(product)
                both.multiply_quantized(product, known[product.weight])


def _keys(stages: Stages, options: Calibrate, windows: np.ndarray, sources: SourceDigests) -> list[Key]:
    """The key of every stage up to the last one with a calibrated method: known before anything is run."""
    looked_at = [i for i, stage in enumerate(stages.stages) if any(p.weight.method.calibrated for p in stage.products)]
    last = max(looked_at, default=-1)
    chain = digest(windows.tolist(), options.asymmetric, source_digest(calibrate), versions(LIBRARIES))
    keys: list[Key] = []
    for number, stage in enumerate(stages.stages[: last + 1]):
        before = sorted(keys[-1].weights.values()) if keys else []
        chain = digest(chain, stages.digest(number, sources.of), before)
        plain = {product.weight: weight_key(product.weight, sources.of(product.weight.source)) for product in stage.products}
        keys.append(Key(chain, {w: digest(chain, key) if w.method.calibrated else key for w, key in plain.items()}))
    return keys


def _states_key(key: Key) -> str:
    return digest("states before", key.chain)


def _resume(
    stages: Stages, scratch: Path, keys: list[Key], store: Store, windows: np.ndarray, known: dict[QuantizedWeight, Entry]
) -> tuple[int, SideBySide, Entry | None]:
    """The stage to go on with, both models before it, and where their states were saved."""
    unfinished = next(number for number, key in enumerate(keys) if not key.weights.keys() <= known.keys())
    for number in range(unfinished, 0, -1):
        if (entry := store.local.get(_states_key(keys[number]))) is not None:
            return number, SideBySide.load(stages, scratch, entry), entry
    return 0, SideBySide.begin(stages, scratch, windows), None


def _opens_layer(stages: Stages, number: int) -> bool:
    """Whether a stage is the first of a decoder layer, where the fewest tensors are carried."""
    before, here = ({_layer(p.weight.name) for p in stages.stages[i].products} for i in (number - 1, number))
    return before != here


def _layer(name: str) -> str | None:
    found = LAYER.search(name)
    return found.group(1) if found else None
