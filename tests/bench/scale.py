"""Memory and time on a checkpoint of true size: `python -m tests.bench.scale [--shape 7b]`, in one run with its peers.

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
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import psutil
from onnx import TensorProto, helper, numpy_helper

from passes._blocks import BlockFormat
from passes._quantized import QuantizedWeight
from passes._registry import find_method
from passes._weights import ArrayWeight
from tests.scale.checkpoint import SHAPES, write_checkpoint

RECIPE = """\
model: {model}
passes:
  - remove_identities
  - narrow_embedding
  - quantize_matmul: {{bits: 4, block_size: {block}, include: [lm_head]}}
  - quantize_matmul: {{bits: {bits}, block_size: {block}, method: rtn}}
{validate}
convert: {{}}
"""
CHUNK = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="0.5b")
    parser.add_argument("--folder", type=Path, default=Path("build/scale"))
    parser.add_argument("--bits", default="4,3")
    parser.add_argument("--windows", type=int, default=0, help="validation windows of 512 tokens; 0 for none")
    options = parser.parse_args()
    model = options.folder / options.shape
    write_checkpoint(model, options.shape)
    shards = sorted(model.glob("*.safetensors"))
    source = sum(p.stat().st_size for p in shards)
    print(f"{options.shape}: {source / 1e9:.2f} GB of bf16\n")
    reading = cold_read(shards)
    print(f"disk, cold read           {source / reading / 1e6:8.0f} MB/s")
    for bits in map(int, options.bits.split(",")):
        road(options.folder, model.resolve(), bits, options.windows, shards, reading)
    peers()


def road(folder: Path, model: Path, bits: int, windows: int, shards: list[Path], reading: float) -> None:
    """One whole run, its memory sampled."""
    recipe, build = folder / f"q{bits}.yaml", folder / "build"
    shutil.rmtree(build, ignore_errors=True)
    validate = f"validate: {{windows: {windows}}}" if windows else ""
    recipe.write_text(RECIPE.format(model=model, bits=bits, block=128 if bits == 4 else 64, validate=validate), "utf-8")
    drop(shards)
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "pipeline", "run", str(recipe), "--build", str(build)])
    peak = sample(process.pid)
    if process.wait():
        raise SystemExit("the run failed")
    whole = time.monotonic() - start
    manifest = json.loads((build / f"q{bits}" / "manifest.json").read_text("utf-8"))
    seconds = {}
    for step in manifest["steps"]:
        seconds[step["name"]] = seconds.get(step["name"], 0.0) + step["seconds"]
    result = (build / f"q{bits}" / "onnx" / "model.onnx.data").stat().st_size
    writing = cold_write(folder / "written", result)
    ours = seconds["quantize_matmul"] + seconds["write onnx"]
    mnn = manifest["size"]["mnn_bytes"]
    print(f"\nq{bits}: {result / 1e9:.2f} GB of ONNX data, {mnn / 1e9:.2f} GB for MNN, {whole:.0f} s in all")
    print(f"peak memory, all processes {peak / 1e9:7.2f} GB")
    print(f"disk, write and fsync     {result / writing / 1e6:8.0f} MB/s")
    print(f"quantize and write        {ours:8.1f} s = {ours / (reading + writing):.2f} x reading and writing once")
    print(f"hand-off and proof        {seconds['convert']:8.1f} s and {seconds['prove']:.1f} s")
    if windows:
        print(f"validation                {seconds['validate']:8.1f} s for {windows} windows of 512 tokens")


def sample(pid: int) -> int:
    """Peak of RssAnon + RssShmem over a process and its children until it ends, bytes."""
    peak, root = 0, psutil.Process(pid)
    while root.is_running() and root.status() != psutil.STATUS_ZOMBIE:
        try:
            family = [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            break
        peak = max(peak, sum(_unreclaimable(one.pid) for one in family))
        time.sleep(0.02)
    return peak


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


def peers() -> None:
    """Kernels on the same weight, ratios per weight to rtn at 4 bits in blocks of 64; the best of three each."""
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
    print("\nper weight, quantizing and packing")
    for name, function, weights in cases:
        function(weights[:64])  # compile
        times = []
        for _ in range(3):
            start = time.monotonic()
            function(weights)
            times.append((time.monotonic() - start) / weights.size)
        base = base or min(times)
        print(f"  {name:<36} {min(times) * 1e9:8.2f} ns  {min(times) / base:6.1f} x")


def _one_matmul(w: np.ndarray) -> onnx.ModelProto:
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["m", size]) for n, size in (("x", w.shape[1]), ("y", len(w))))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="m")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(np.ascontiguousarray(w.T), "w")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


if __name__ == "__main__":
    main()
