"""The scales that `fold_channel_scales` left open, and text -> their values, each searched for the inputs that it sees."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs
from threadpoolctl import threadpool_limits

from lowbit.passes.graph.quantized_ops import quantized_matmuls
from lowbit.passes.methods.awq import search_scale
from lowbit.passes.quant.scaled_weight import ChannelScale, read_scale
from lowbit.pipeline.calibrate.activations import PairedActivations
from lowbit.pipeline.calibrate.subgraphs import PartitionedGraph, Product
from lowbit.pipeline.runtime.memory import return_memory
from lowbit.pipeline.runtime.session import weight_folder
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.source_digest import source_digest
from lowbit.pipeline.store.store import Entry, Store
from lowbit.pipeline.store.weight_keys import SourceDigests, how_quantized

LIBRARIES = ("numba", "numpy", "onnxruntime")
TOKENS = 1024
"""Places in the text at which outputs are compared."""
VALUES = "values.npy"
Report = Callable[[float, str], None]


@dataclass(frozen=True)
class Search:
    """One scale: the subgraph whose products read it, those products, and the key of its values."""

    scale: ChannelScale
    subgraph: int
    products: list[Product]
    key: str


def find_channel_scales(
    graph: gs.Graph, windows: npt.NDArray[np.int64], sources: SourceDigests, store: Store, report: Report
) -> tuple[list[str], int]:
    """Give every scale of `graph` its values: search them, or recall them.

    Args:
        windows: int64 [windows, tokens].
        report: gets the share done and the time left.

    Returns:
        The keys of all scales, and how many were searched. Each is kept as soon as it is found.
    """
    partitioned = PartitionedGraph(graph, weight_folder(graph))
    searches = _searches(partitioned, windows, sources)
    entries = {search.key: entry for search in searches if (entry := store.get(search.key)) is not None}
    missing = [search for search in searches if search.key not in entries]
    if missing:
        with threadpool_limits(1, "blas"), store.scratch() as scratch:
            entries |= _search_all(PairedActivations.begin(partitioned, scratch, windows), missing, store, report)
            return_memory()
    for search in searches:
        search.scale.values = np.load(entries[search.key].file(VALUES))
    return [search.key for search in searches], len(missing)


def set_to_one(graph: gs.Graph) -> bool:
    """Let no scale change anything; whether there are any."""
    scales = [scale for _, weight in quantized_matmuls(graph) if (scale := read_scale(weight.source)) is not None]
    for scale in scales:
        scale.values = np.ones(scale.size, np.float32)
    return bool(scales)


def _search_all(activations: PairedActivations, missing: list[Search], store: Store, report: Report) -> dict[str, Entry]:
    """Search the values of scales, in the order in which the float model comes to their readers; returns entries by key."""
    partitioned, count = activations.partitioned, missing[-1].subgraph + 1
    entries: dict[str, Entry] = {}
    begun = time.monotonic()
    for number in range(count):
        activations.run_exact(number)
        for search in missing:
            if search.subgraph == number:
                x = activations.sample(search.products[0].x, TOKENS)
                entries[search.key] = store.put(search.key, partial(_write_values, x, search))
        later = partitioned.read_after(number)
        for product in partitioned.subgraphs[number].products:
            if product.y in later:
                activations.multiply_exact(product)
        activations.release(number)
        done = (number + 1) / count
        report(done, f"{(time.monotonic() - begun) * (1 - done) / done:,.0f} s left")
    return entries


def _write_values(x: npt.NDArray[np.float32], search: Search, folder: Path) -> dict[str, object]:
    weights = [product.weight for product in search.products]
    np.save(folder / VALUES, search_scale(x, weights, search.scale))
    return {}


def _searches(partitioned: PartitionedGraph, windows: npt.NDArray[np.int64], sources: SourceDigests) -> list[Search]:
    """Every scale in the order in which its readers come; all are ones until the search is over."""
    set_to_one(partitioned.graph)
    chain = digest("channel scales", windows.tolist(), source_digest(find_channel_scales), versions(LIBRARIES))
    searches = []
    for number, subgraph in enumerate(partitioned.subgraphs):
        readers: dict[ChannelScale, list[Product]] = {}
        for product in subgraph.products:
            if (scale := read_scale(product.weight.source)) is not None:
                readers.setdefault(scale, []).append(product)
        inputs = [sources.of(product.weight.source) for product in subgraph.products]
        chain = digest(chain, partitioned.digest(number, sources.of), inputs)
        for scale, products in readers.items():
            layers = [[product.weight.name, *how_quantized(product.weight)] for product in products]
            searches.append(Search(scale, number, products, digest(chain, layers, scale.ratios)))
    return searches
