"""`lowbit doctor`: whether everything that runs need is here, and what to do where it is not."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
from rich.table import Table

from lowbit.passes.quant.parallel import core_count
from lowbit.pipeline.processes import run_worker
from lowbit.pipeline.recipe.load import RECIPES
from lowbit.pipeline.report.plain_text import plain
from lowbit.pipeline.report.units import megabytes
from lowbit.pipeline.store.digests import versions

PYTHON = (3, 11)
LITTLE_MEMORY, LITTLE_DISK = 4_000_000_000, 5_000_000_000
SECONDS = 120
"""An engine that has not answered by then hangs."""

TRY_ONNXRUNTIME = """
import numpy as np, onnx, onnxruntime
from onnx import TensorProto as T, helper as h, numpy_helper as n
for bits in (2, 4, 8):
    codes, scales = np.zeros((8, 2, 16 * bits // 8), np.uint8), np.ones(16, np.float32)
    node = h.make_node("MatMulNBits", ["x", "c", "s"], ["y"], domain="com.microsoft", K=32, N=8, bits=bits, block_size=16)
    x, y = (h.make_tensor_value_info(name, T.FLOAT, [1, k]) for name, k in (("x", 32), ("y", 8)))
    graph = h.make_graph([node], "g", [x], [y], [n.from_array(codes, "c"), n.from_array(scales, "s")])
    opsets = [h.make_opsetid("", 18), h.make_opsetid("com.microsoft", 1)]
    model = h.make_model(graph, opset_imports=opsets, ir_version=10)
    y = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": np.ones((1, 32), np.float32)})[0]
    assert (y == -32 * 2 ** (bits - 1)).all(), (bits, y)
"""
TRY_MNN = """
import numpy as np
from MNN import expr
import MNN.llm, _tools
x = expr.const(np.arange(4, dtype=np.float32), [4], expr.NCHW, expr.float)
assert (np.array((x + x).read()).reshape(-1) == [0, 2, 4, 6]).all()
"""
TRY_GENAI = "import onnxruntime_genai"
TRY_TORCH = "import torch, transformers, optimum.exporters.onnx\nassert torch.ones(2).sum() == 2"

REPAIR = "rm -r .venv and type make again" if (RECIPES.parent / "Makefile").exists() else "pip install --force-reinstall lowbit"
"""In a checkout, and where a wheel was installed."""

Finding = tuple[str, bool, str]
"""What was looked at, whether it is well, and what was found or what to do."""


def examine(build: Path) -> list[Finding]:
    """Look at everything."""
    return [
        python(), memory(), disk(build), cores(),
        engine("onnxruntime", TRY_ONNXRUNTIME, "its MatMulNBits computes at 2, 4 and 8 bits", "onnxruntime"),
        engine("MNN", TRY_MNN, "it computes, and its converter is there", "MNN"),
        engine("torch", TRY_TORCH, "models can be exported", "torch"),
        engine("onnxruntime-genai", TRY_GENAI, "it opens", "onnxruntime-genai", optional="lowbit[genai]"),
    ]  # fmt: skip


def findings_table(findings: list[Finding]) -> Table:
    """For the terminal."""
    table = Table(show_header=False)
    for name, well, text in findings:
        table.add_row(name, "ok" if well else "!", plain(text), style="" if well else "bold red")
    return table


def python() -> Finding:
    """Whether this Python is new enough."""
    found = platform.python_version()
    if sys.version_info < PYTHON:
        return "Python", False, f"{found}; 3.11 or newer is needed: make PYTHON=python3.12, after rm -r .venv"
    return "Python", True, f"{found}, {platform.machine()}, {platform.system()}"


def memory() -> Finding:
    """Whether a large model fits into what is free."""
    now = psutil.virtual_memory()
    text = f"{megabytes(now.available)} of {megabytes(now.total)} are free"
    if now.available < LITTLE_MEMORY:
        return "memory", False, f"{text}; a 7B model takes about 2 GB, validating it 4 GB. Close something."
    return "memory", True, text


def disk(build: Path) -> Finding:
    """Whether a large result can be written to the build folder."""
    folder = next(one for one in (build, *build.resolve().parents) if one.exists())
    free = shutil.disk_usage(folder).free
    text = f"{megabytes(free)} are free in {folder}"
    if not os.access(folder, os.W_OK):
        return "disk", False, f"{folder} cannot be written to; build elsewhere with --build"
    if free < LITTLE_DISK:
        return "disk", False, f"{text}; a 7B model at 3 bits takes 9 GB beside its checkpoint. Build elsewhere with --build."
    return "disk", True, text


def cores() -> Finding:
    """How many cores a run uses."""
    return "cores", True, f"{core_count()} to be used, {os.cpu_count()} in all"


def engine(name: str, code: str, works: str, package: str, optional: str | None = None) -> Finding:
    """Whether `code`, in a process of its own, finds that a package works; an optional one may be missing."""
    version = versions((package,)).get(package)
    install = f"pip install {optional}" if optional else REPAIR
    if version is None:
        return name, optional is not None, f"not installed; {install}"
    try:
        done = run_worker("-c", code, seconds=SECONDS)
    except subprocess.TimeoutExpired:
        return name, False, f"{version} hangs; {install}"
    if done.returncode == 0:
        return name, True, f"{version}: {works}"
    why = f"died of signal {-done.returncode}" if done.returncode < 0 else (done.stderr.strip().splitlines() or ["no word"])[-1]
    return name, False, f"{version} does not run here ({why}); {install}"
