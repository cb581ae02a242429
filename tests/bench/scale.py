"""Memory, time, disk and faults on a checkpoint of true size: `python -m tests.bench.scale [--shape 7b]`, with peers.

Memory is the sum over the process and its children of anonymous and shared resident pages (RssAnon + RssShmem of
/proc/PID/status), sampled every 20 ms: all that the system cannot take back. The source is dropped from the page cache
(posix_fadvise DONTNEED) before each timed run, and the disk's own speed is measured the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.weights import ArrayWeight
from lowbit.passes.registry import find_method
from lowbit.pipeline.commands.plan import make_plan
from lowbit.pipeline.recipe.load import load_recipe
from tests.scale.checkpoint import SHAPES, write_checkpoint

RECIPE = """\
model: {model}
passes:
  - remove_identities
  - narrow_embedding
  - quantize_matmul: {{bits: 4, block_size: {block}, include: [lm_head]}}{special}
  - quantize_matmul: {{bits: {bits}, block_size: {block}, method: {method}}}
{validate}
convert: {{}}
"""
CHUNK = 8 << 20
Row = tuple[str, str, str]


@dataclass(frozen=True)
class Road:
    """One run of `lowbit run`, and what it took.

    Attributes:
        peak_memory, peak_disk: bytes; the disk is what the build folder gained at most.
    """

    seconds: float
    peak_memory: int
    peak_disk: int
    manifest: dict[str, Any]

    def step(self, name: str) -> float:
        """Seconds of a step."""
        return float(sum(step["seconds"] for step in self.manifest["steps"] if step["name"] == name))

    @property
    def size(self) -> int:
        """Bytes of both results."""
        return int(self.manifest["size"]["onnx_bytes"] + self.manifest["size"]["mnn_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--folder", type=Path, default=Path("build/scale"))
    parser.add_argument("--windows", type=int, default=1, help="validation windows of 512 tokens")
    options = parser.parse_args()
    model = (options.folder / options.shape).resolve()
    write_checkpoint(model, options.shape)
    shards = sorted(model.glob("*.safetensors"))
    bench = Bench(options.folder, model, shards)
    table = Table("", "what", "figure", title=f"{options.shape}, {bench.source / 1e9:.2f} GB of bf16", title_justify="left")
    for rows in (bench.roads(), bench.one_change(), bench.validation(options.windows), bench.faults(), kernels()):
        for row in rows:
            print(*row, sep="  |  ", flush=True)
            table.add_row(*row)
    Console(width=130).print(table)


class Bench:
    """The runs on one checkpoint; each method gives rows (its point, what, figure)."""

    def __init__(self, folder: Path, model: Path, shards: list[Path]) -> None:
        self.folder, self.model, self.shards = folder, model, shards
        self.source = sum(p.stat().st_size for p in shards)
        self.build = folder / "build"
        shutil.rmtree(self.build, ignore_errors=True)

    def recipe(self, name: str, bits: int, block: int, method: str = "rtn", down: int | None = None, windows: int = 0) -> Path:
        """A recipe in the bench's folder."""
        special = f"\n  - quantize_matmul: {{bits: {down}, block_size: {block}, include: ['*.down_proj']}}" if down else ""
        path = self.folder / f"{name}.yaml"
        path.write_text(
            RECIPE.format(
                model=self.model, bits=bits, block=block, method=method, special=special,
                validate=f"validate: {{windows: {windows}}}" if windows else "",
            ),
            "utf-8",
        )  # fmt: skip
        return path

    def run(self, recipe: Path, build: Path | None = None, cores: int | None = None) -> Road:
        """Run a recipe with the source out of the page cache, sampling memory and disk."""
        build = build or self.build
        build.mkdir(parents=True, exist_ok=True)
        drop(self.shards)
        free, start = shutil.disk_usage(build).free, time.monotonic()
        process = self.start(recipe, build, cores)
        memory, lowest = sample(process.pid, build)
        if process.wait():
            raise SystemExit(f"the run of {recipe} failed")
        manifest = json.loads((build / recipe.stem / "manifest.json").read_text("utf-8"))
        return Road(time.monotonic() - start, memory, free - lowest, manifest)

    def start(self, recipe: Path, build: Path, cores: int | None = None) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "lowbit", "run", str(recipe), "--build", str(build)], stdout=subprocess.DEVNULL
        )
        os.sched_setaffinity(process.pid, sorted(os.sched_getaffinity(0))[:cores])
        return process

    def roads(self) -> Iterator[Row]:
        """Whole runs without validation: memory, time, hand-off, disk, plan."""
        reading = cold_read(self.shards)
        yield "2", "disk, cold read", f"{self.source / reading / 1e6:.0f} MB/s"
        for name, bits, block, method in (("q4", 4, 128, "rtn"), ("q3", 3, 64, "rtn"), ("q3-mse", 3, 64, "mse")):
            shutil.rmtree(self.build / ".store", ignore_errors=True)
            recipe = self.recipe(name, bits, block, method)
            start = time.monotonic()
            command = [sys.executable, "-m", "lowbit", "plan", str(recipe), "--build", str(self.build)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            planning = time.monotonic() - start
            plan = make_plan(load_recipe(recipe), self.build, None)
            road = self.run(recipe)
            data = (self.build / name / "onnx" / "model.onnx.data").stat().st_size
            writing = cold_write(self.folder / "written", data)
            ours = road.step("write onnx")
            yield "1", f"{name}: peak memory of all processes", f"{road.peak_memory / 1e9:.2f} GB"
            yield "2", f"{name}: whole run", f"{road.seconds:.0f} s"
            yield "2", f"{name}: disk, write and fsync", f"{data / writing / 1e6:.0f} MB/s"
            ratio = ours / (reading + writing)
            yield "2", f"{name}: quantize and write", f"{ours:.1f} s = {ratio:.2f} x reading and writing once"
            for step, what in (("lower", "lowering, checked in onnxruntime"), ("convert", "hand-off"), ("prove", "proof")):
                yield "3", f"{name}: {what}", f"{road.step(step):.1f} s"
            yield (
                "4",
                f"{name}: most disk used",
                f"{road.peak_disk / road.size:.2f} x the result, planned {plan.disk_bytes / road.size:.2f} x",
            )
            size = road.manifest["size"]
            off = max(
                abs(plan.onnx_bytes / size["onnx_bytes"] - 1), abs(plan.hand_off_bytes["mnn-llm"] / size["mnn_bytes"] - 1)
            )
            yield "5", f"{name}: plan", f"{planning:.1f} s, sizes within {off:.2%}, {plan.seconds:.0f} s expected"

    def one_change(self) -> Iterator[Row]:
        """down_proj from 3 to 4 bits in a finished run."""
        road = self.run(self.recipe("q3-mse", 3, 64, "mse", down=4))
        note = next(step["notes"][0] for step in road.manifest["steps"] if step["name"] == "write onnx")
        yield "7", "q3-mse, down_proj from 3 to 4 bits", f"{note}, {road.step('write onnx'):.1f} s"

    def validation(self, windows: int) -> Iterator[Row]:
        """The same codes, validated block by block."""
        road = self.run(self.recipe("q3-mse", 3, 64, "mse", windows=windows))
        seconds = f"{road.step('reference'):.0f} s + {road.step('validate'):.0f} s"
        yield "8", f"validation, {windows} x 512 tokens, reference + candidate", seconds
        yield "8", "peak memory with validation", f"{road.peak_memory / 1e9:.2f} GB"

    def faults(self) -> Iterator[Row]:
        """The same run killed three times, then ended on one core: the same bytes, nothing made twice."""
        recipe, other = self.recipe("q4", 4, 128), self.folder / "killed"
        shutil.rmtree(other, ignore_errors=True)
        undisturbed = json.loads((self.build / "q4" / "manifest.json").read_text("utf-8"))
        whole = sum(step["seconds"] for step in undisturbed["steps"])
        kept: dict[Path, int] = {}
        again = 0
        for share in (0.25, 0.35, 0.45):
            process = self.start(recipe, other)
            time.sleep(share * whole)
            process.kill()
            process.wait()
            now = {path: path.stat().st_mtime_ns for path in (other / ".store").glob("*/*/entry.json")}
            again += sum(now.get(path) != when for path, when in kept.items())
            kept = now
        road = self.run(recipe, other, cores=1)
        one, other_files = ({**files, "report.html": ""} for files in (road.manifest["files"], undisturbed["files"]))
        same = one == other_files  # but for how long the steps took
        shutil.rmtree(other)
        yield "6", "killed 3 times: results made twice", str(again)
        yield "6, 9", "killed 3 times, ended on one core: every byte the same", "yes" if same else "NO"


def sample(pid: int, disk: Path) -> tuple[int, int]:
    """Peak of RssAnon + RssShmem over a process and its children until it ends, and the least free space; bytes."""
    peak, lowest, root = 0, shutil.disk_usage(disk).free, psutil.Process(pid)
    while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
        try:
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        peak = max(peak, sum(_unreclaimable(one.pid) for one in family))
        lowest = min(lowest, shutil.disk_usage(disk).free)
        time.sleep(0.02)
    return peak, lowest


def _unreclaimable(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(("RssAnon", "RssShmem")))


def drop(files: list[Path]) -> None:
    """Take files out of the page cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def cold_read(files: list[Path]) -> float:
    """Seconds to read files once, from the disk."""
    drop(files)
    buffer = bytearray(CHUNK)
    start = time.monotonic()
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.monotonic() - start


def cold_write(path: Path, size: int) -> float:
    """Seconds to write and sync `size` bytes."""
    data = os.urandom(CHUNK)
    start = time.monotonic()
    with path.open("wb", buffering=0) as stream:
        for _ in range(-(-size // CHUNK)):
            stream.write(data)
        os.fsync(stream.fileno())
    taken = time.monotonic() - start
    path.unlink()
    return taken


def kernels() -> Iterator[Row]:
    """Kernels and peers on the same weight, ratios per weight to rtn at 4 bits in blocks of 64; the best of three each."""
    rows = np.random.default_rng(0).standard_normal((4736, 3584)).astype(np.float32)
    half = rows.astype(ml_dtypes.bfloat16)

    def ours(method: str, part: np.ndarray) -> None:
        form = BlockFormat(4, 64, False, "fp16")
        for _ in QuantizedWeight("w", ArrayWeight(part), form, find_method(method)()).chunks():
            pass

    def plain(part: np.ndarray) -> None:
        w = part.reshape(len(part), -1, 64)
        low, high = np.minimum(w.min(-1, keepdims=True), 0), np.maximum(w.max(-1, keepdims=True), 0)
        scale = (high - low) / 15
        zero = np.rint(-low / scale)
        codes = np.clip(np.rint(w / scale) + zero, 0, 15).astype(np.uint8)
        _ = codes[..., ::2] | codes[..., 1::2] << 4

    def onnxruntime(part: np.ndarray) -> None:
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        config = DefaultWeightOnlyQuantConfig(block_size=64, is_symmetric=False, bits=4)
        MatMulNBitsQuantizer(_one_matmul(part), bits=4, algo_config=config).process()

    cases: list[tuple[str, Callable[[np.ndarray], None], np.ndarray]] = [
        ("lowbit rtn, packed, with its error", lambda w: ours("rtn", w), half),
        ("lowbit mse", lambda w: ours("mse", w), half),
        ("lowbit hqq", lambda w: ours("hqq", w), half[:592]),
        ("numpy round to nearest", plain, rows),
        ("onnxruntime MatMulNBitsQuantizer", onnxruntime, rows),
    ]
    base = 0.0
    for name, function, weights in cases:
        function(weights[:64])  # compile
        times = []
        for _ in range(3):
            start = time.monotonic()
            function(weights)
            times.append((time.monotonic() - start) / weights.size)
        base = base or min(times)
        yield "2", f"per weight: {name}", f"{min(times) * 1e9:.2f} ns = {min(times) / base:.1f} x"


def _one_matmul(w: np.ndarray) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["m", size]) for n, size in (("x", w.shape[1]), ("y", len(w))))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(np.ascontiguousarray(w.T), "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


if __name__ == "__main__":
    main()
