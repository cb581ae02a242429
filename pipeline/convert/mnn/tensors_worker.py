"""Within a process of its own: any MNN model on given inputs; run as `python -m <this> REQUEST.json RESULT.npz`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MEMORY = {"memory_high": 1, "memory_low": 2}
"""Modes as MNN numbers them: its Python module takes numbers only, and ignores anything else in silence."""
KINDS = {"f": np.float32, "i": np.int32, "b": np.int32, "u": np.int32}
"""What MNN takes an array of a kind as."""


def _main(request_file: str, result_file: str) -> None:
    asked = json.loads(Path(request_file).read_text("utf-8"))
    results: dict[str, npt.NDArray[Any]] = {}
    with np.load(asked["samples"]) as samples:
        for mode in asked["modes"]:
            module = _open(asked, mode)
            for number in range(asked["count"]):
                found = _run(module, [samples[f"{number}.{name}"] for name in asked["inputs"]])
                results |= {f"{mode}.{number}.{name}": value for name, value in zip(asked["outputs"], found, strict=True)}
    np.savez(result_file, allow_pickle=False, **results)


def _open(asked: dict[str, Any], mode: str) -> Any:
    from MNN import nn

    settings = {"backend": 0, "precision": 1, "memory": MEMORY[mode], "numThread": os.cpu_count()}
    runtime = nn.create_runtime_manager((settings,))
    runtime.set_external(f"{asked['model']}.weight")
    return nn.load_module_from_file(asked["model"], asked["inputs"], asked["outputs"], runtime_manager=runtime)


def _run(module: Any, arrays: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    from MNN import expr

    types = {np.float32: expr.float, np.int32: expr.int}
    given = []
    for array in arrays:
        dtype = KINDS[array.dtype.kind]
        given.append(expr.const(np.ascontiguousarray(array, dtype), list(array.shape), expr.NCHW, types[dtype]))
    outputs = module.forward(given)
    values = []
    for value in outputs if isinstance(outputs, list) else [outputs]:
        plain = expr.convert(value, expr.NCHW) if value.data_format == expr.NC4HW4 else value
        values.append(np.array(plain.read()).reshape(value.shape))
    return values


if __name__ == "__main__":
    _main(*sys.argv[1:])
