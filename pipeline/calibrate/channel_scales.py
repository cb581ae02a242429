"""What `fold_channel_scales` left open: the float model reads text, and each scale is searched for the inputs that it sees."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from threadpoolctl import threadpool_limits

from lowbit.passes.graph.quantized_ops import quantized_matmuls
from lowbit.passes.methods.awq import search_scale
from lowbit.passes.quant.scaled_weight import ChannelScale, read_scale
from lowbit.pipeline.calibrate.activations import SideBySide
from lowbit.pipeline.calibrate.subgraphs import Product, Stages
from lowbit.pipeline.runtime.memory import return_memory
from lowbit.pipeline.runtime.session import weight_folder
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.store.store import Store
from lowbit.pipeline.store.weight_keys import SourceDigests, how_quantized

LIBRARIES = ("numba", "numpy", "onnxruntime")
TOKENS = 1024
"""Places in the text at which outputs are compared."""
VALUES = "values.npy"
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Search:
    """One scale: the stage whose products read it, those products, and what its values depend on."""

    scale: ChannelScale
    stage: int
    products: list[Product]
    key: str


def find_channel_scales(
    graph: gs.Graph, windows: np.ndarray, sources: SourceDigests, store: Store, report: Report
) -> tuple[list[str], int]:
    """Give every scale of `graph` its values: search them, or recall them.

    Args:
        windows: int64 [windows, tokens].
        report: gets the share done and the time left.

    Returns:
        The keys of all scales, and how many were searched. Each is kept as soon as it is found.
    """
    stages = Stages(graph, weight_folder(graph))
    searches = _searches(stages, windows, sources)
    missing = [one for one in searches if not store.has(one.key)]
    if missing:
        begun = time.monotonic()
        with threadpool_limits(1, "blas"), store.scratch() as scratch:
            model = SideBySide.begin(stages, scratch, windows)
            for number in range(missing[-1].stage + 1):
                model.run_exact(number)
                for one in (one for one in missing if one.stage == number):
                    _search(model, one, store)
                later = stages.read_after(number)
                for product in stages.stages[number].products:
                    if product.y in later:
                        model.multiply_exact(product)
                model.release(number)
                done = (number + 1) / (missing[-1].stage + 1)
                report(done, f"{(time.monotonic() - begun) * (1 - done) / done:,.0f} s left")
            return_memory()
    for one in searches:
        entry = store.get(one.key)
        assert entry is not None
        one.scale.values = np.load(entry.file(VALUES))
    return [one.key for one in searches], len(missing)


def set_to_one(graph: gs.Graph) -> bool:
    """Let no scale change anything; whether there are any."""
    scales = [scale for _, weight in quantized_matmuls(graph) if (scale := read_scale(weight.source)) is not None]
    for scale in scales:
        scale.values = np.ones(scale.size, np.float32)
    return bool(scales)


def _search(model: SideBySide, one: Search, store: Store) -> None:
    def write(folder: Path) -> dict[str, Any]:
        x = model.sample(one.products[0].x, TOKENS)
        np.save(folder / VALUES, search_scale(x, [product.weight for product in one.products], one.scale))
        return {}

    store.put(one.key, write)


def _searches(stages: Stages, windows: np.ndarray, sources: SourceDigests) -> list[Search]:
    """Every scale in the order in which its readers come; all are ones until the search is over."""
    set_to_one(stages.graph)
    chain = digest("channel scales", windows.tolist(), source_digest(find_channel_scales), versions(LIBRARIES))
    found = []
    for number, stage in enumerate(stages.stages):
        reading: dict[int, list[Product]] = {}
        for product in stage.products:
            if (scale := read_scale(product.weight.source)) is not None:
                reading.setdefault(id(scale), []).append(product)
        chain = digest(chain, stages.digest(number, sources.of), [sources.of(p.weight.source) for p in stage.products])
        for products in reading.values():
            scale = read_scale(products[0].weight.source)
            assert scale is not None
            layers = [[product.weight.name, *how_quantized(product.weight)] for product in products]
            key = digest(chain, layers, scale.ratios)
            found.append(Search(scale, number, products, key))
    return found
