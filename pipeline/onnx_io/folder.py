"""A finished graph -> the folder `onnx`: its weights stream into one data file, the graph goes beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_graphsurgeon as gs

from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.pipeline.onnx_io.stream import Streamed, stream_weights
from lowbit.pipeline.onnx_io.writer import DATA, MODEL, DataFile, exported, external_weights, quantization_metadata, write_model
from lowbit.pipeline.store.store import Entry, Store
from lowbit.pipeline.store.weight_keys import SourceDigests


def write_files(
    graph: gs.Graph, folder: Path, sources: SourceDigests, store: Store, progress: Callable[[int, int], None],
    known: dict[QuantizedWeight, Entry],
) -> Streamed:  # fmt: skip
    """Quantize, or recall, every weight of `graph` straight into model.onnx.data; `known` ones are taken as they are."""
    data = DataFile(folder / DATA)
    streamed = stream_weights(external_weights(graph), sources, store, data, progress, known)
    data.close()
    write_model(exported(graph, quantization_metadata(list(streamed.entries))), folder / MODEL, streamed.places)
    onnx.checker.check_model(str(folder / MODEL))
    return streamed
