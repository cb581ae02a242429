"""Within a process of its own: any MNN model on given inputs; `python -m pipeline.convert.mnn_run REQUEST.json RESULT.npz`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

MEMORY = {"normal": 0, "high": 1, "low": 2}
"""Names of MNN's memory modes; its Python module takes numbers only, and ignores anything else in silence."""


def _main(request_file: str, result_file: str) -> None:
    from MNN import expr, nn

    asked = json.loads(Path(request_file).read_text())
    settings = {"backend": 0, "precision": 1, "memory": MEMORY[asked["memory"]], "numThread": os.cpu_count()}
    runtime = nn.create_runtime_manager((settings,))
    runtime.set_external(f"{asked['model']}.weight")
    module = nn.load_module_from_file(asked["model"], asked["inputs"], asked["outputs"], runtime_manager=runtime)
    kinds = {"f": (np.float32, expr.float), "i": (np.int32, expr.int), "b": (np.int32, expr.int), "u": (np.int32, expr.int)}
    results = {}
    with np.load(asked["samples"]) as samples:
        for number in range(asked["count"]):
            arrays = [samples[f"{number}.{name}"] for name in asked["inputs"]]
            given = []
            for array in arrays:
                dtype, kind = kinds[array.dtype.kind]
                given.append(expr.const(np.ascontiguousarray(array, dtype), list(array.shape), expr.NCHW, kind))
            found = module.forward(given)
            for name, value in zip(asked["outputs"], found if isinstance(found, list) else [found], strict=True):
                plain = expr.convert(value, expr.NCHW) if value.data_format == expr.NC4HW4 else value
                results[f"{number}.{name}"] = np.array(plain.read()).reshape(value.shape)
    np.savez(result_file, allow_pickle=False, **results)


if __name__ == "__main__":
    _main(*sys.argv[1:])
