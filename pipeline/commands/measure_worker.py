"""Within a process of its own: times weight by vector; `python -m lowbit.pipeline.commands.measure_worker ENGINE FOLDER`."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

CALLS, BATCHES = 10, 10


def _mnn(folder: Path) -> Callable[[], object]:
    from MNN import expr, nn

    settings = {"backend": 0, "precision": 2, "memory": 2, "numThread": os.cpu_count()}
    runtime = nn.create_runtime_manager((settings,))
    model = folder / "mnn" / "model.mnn"
    runtime.set_external(f"{model}.weight")
    module = nn.load_module_from_file(str(model), ["x"], ["y"], runtime_manager=runtime)
    values = _vector(folder)
    given = expr.const(values, list(values.shape), expr.NCHW, expr.float)
    return lambda: module.forward([given])[0].read()


def _onnxruntime(folder: Path) -> Callable[[], object]:
    from lowbit.pipeline.runtime.session import open_model

    session = open_model(folder / "onnx" / "model.onnx")
    values = _vector(folder)
    return lambda: session.run(None, {"x": values})


def _vector(folder: Path) -> np.ndarray:
    k = next(iter(json.loads((folder / "manifest.json").read_text("utf-8"))["weights"].values()))["shape"][1]
    return np.random.default_rng(0).standard_normal((1, k), np.float32)


def _main(engine: str, folder: str) -> None:
    call = {"mnn": _mnn, "onnxruntime": _onnxruntime}[engine](Path(folder))
    best = float("inf")
    for _ in range(BATCHES + 1):  # the first warms up
        began = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - began) / CALLS)
    print(json.dumps(best * 1e6))


if __name__ == "__main__":
    _main(*sys.argv[1:])
