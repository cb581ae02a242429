"""`lowbit measure`: how long a product takes at each width on this machine, in MNN and in onnxruntime."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import yaml
from rich.console import Console
from rich.table import Table

from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.mixed_precision.device_times import DeviceTimes
from lowbit.pipeline.processes import run_worker
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.report.plain_text import plain
from lowbit.pipeline.run.runner import run_recipe
from lowbit.pipeline.store.digests import versions
from lowbit.pipeline.store.store import Store, writing

SHAPE = (14336, 4096)
"""N and K: the largest product of a model of 8B, as in the tables that come along."""
BLOCK_SIZE, BITS, ROUNDS = 64, (2, 3, 4, 8), 5
ENGINES = {"mnn": "MNN", "onnxruntime": "onnxruntime"}
RECIPE = """\
model: ./product.onnx
passes:
  - quantize_matmul: {{bits: {bits}, block_size: {block_size}, symmetric: true}}
convert: {{target: mnn}}
"""


def measure(into: Path, build: Path, console: Console, shape: tuple[int, int] = SHAPE) -> list[Path]:
    """Write a table for each engine, `<engine>-here.yaml`, and return their paths.

    All widths take turns, ROUNDS times, each in a process of its own; the best time counts.
    """
    store = Store(build / ".store")
    with writing(build), store.scratch() as scratch:
        _write_product(scratch / "product.onnx", shape)
        made = {}
        for bits in BITS:
            file = scratch / f"{bits}.yaml"
            file.write_text(RECIPE.format(bits=bits, block_size=BLOCK_SIZE), "utf-8")
            made[bits] = run_recipe(load_recipe(file), scratch / "build", None, Console(quiet=True), store)
            console.print(f"  {bits} bits are made")
        best: dict[str, dict[int, float]] = {engine: {} for engine in ENGINES}
        for _ in range(ROUNDS):
            for engine, times in best.items():
                for bits, folder in made.items():
                    times[bits] = min(_microseconds(engine, folder), times.get(bits, float("inf")))
    with writing(into):
        return [_write(into, engine, times, shape, console) for engine, times in best.items()]


def _write_product(file: Path, shape: tuple[int, int]) -> None:
    n, k = shape
    weight = np.random.default_rng(0).standard_normal((k, n), np.float32)
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["": 18]> product (float[1, {k}] x) => (float[1, {n}] y) {{ y = MatMul (x, a_weight) }}'
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "a_weight"))
    onnx.save(model, str(file), save_as_external_data=True, location="product.data", size_threshold=0)


def _microseconds(engine: str, folder: Path) -> float:
    found = run_worker("-m", "lowbit.pipeline.commands.measure_worker", engine, str(folder))
    if found.returncode:
        raise PipelineError(f"{ENGINES[engine]} did not run here: {found.stderr.strip().splitlines()[-1:]}")
    return float(json.loads(found.stdout.splitlines()[-1]))


def _write(into: Path, engine: str, times: dict[int, float], shape: tuple[int, int], console: Console) -> Path:
    version = next(iter(versions((ENGINES[engine],)).values()))
    table = DeviceTimes(
        device=f"{platform.machine()}, {platform.processor() or platform.system()}", engine=f"{ENGINES[engine]} {version}, CPU",
        source="lowbit measure", shape=shape, block_size=BLOCK_SIZE, microseconds={b: round(t, 1) for b, t in times.items()},
    )  # fmt: skip
    into.mkdir(parents=True, exist_ok=True)
    path = into / f"{engine}-here.yaml"
    content: dict[str, Any] = table.model_dump(mode="json")
    path.write_text(yaml.safe_dump(content, sort_keys=False, default_flow_style=None), "utf-8")
    shown = Table("bits", "us", "of 4 bits")
    for bits, share in table.relative(BITS).items():
        shown.add_row(str(bits), f"{table.microseconds[bits]:.0f}", f"{share:.2f} x")
    console.print(plain(f"{ENGINES[engine]}, in {path}:"))
    console.print(shown)
    return path
