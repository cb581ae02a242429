"""Tokens per second while decoding: `python -m tests.bench.decode [--shape demo|0.5b]`, ours beside the engines' own files.

Each file is loaded in a process of its own, reads PROMPT tokens and decodes TOKENS more, greedily, on all cores; all take turns
for ROUNDS rounds, and the best of each counts: machines are noisy. `onnxruntime-genai`'s own builder needs a newer transformers
than ours, which is installed beside it once, in the bench's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tests.bench.scale import sample
from tests.conftest import PYDOCS
from tests.scale.checkpoint import write_checkpoint

PROMPT, TOKENS, ROUNDS = 128, 64, 5
BUILDER_NEEDS = "transformers==5.23.0"
RECIPE = """\
model: {model}
passes:
  - remove_identities
  - quantize_embedding: {{bits: 4, block_size: 32}}
  - quantize_matmul: {{bits: 4, block_size: 32, symmetric: true, include: [lm_head]}}
  - quantize_matmul: {{bits: {bits}, block_size: 32, symmetric: true}}
convert: [{{target: onnxruntime-genai, three_bit: {three_bit}}}, {{target: mnn-llm}}]
"""
"""The builder's own form, blocks of 32 without zero points, so that only the making differs."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=["demo", "0.5b"], default="demo")
    parser.add_argument("--folder", type=Path, default=Path("build/decode"))
    parser.add_argument("--worker", nargs=2, metavar=("ENGINE", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(ENGINES[options.worker[0]](Path(options.worker[1]))))
        return
    bench(options.shape, options.folder.resolve() / options.shape)


def bench(shape: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    model = PYDOCS
    if shape != "demo":
        model = folder / "checkpoint"
        write_checkpoint(model, shape)
    builder, builder_memory = build_with_builder(model, folder)
    files: dict[str, tuple[str, Path]] = {"genai's builder, int4": ("genai", builder)}
    memory: dict[str, int] = {"genai's builder, int4": builder_memory}
    for bits, three_bit in ((4, "packed"), (3, "packed"), (3, "folded"), (2, "packed")):
        made, peak = make(model, folder, bits, three_bit)
        what = f"{bits} bits" + (f" ({three_bit})" if bits == 3 else "")
        files[f"ours, {what}, genai"] = "genai", made / "genai"
        memory[f"ours, {what}, genai"] = peak
        if three_bit == "packed":
            files[f"ours, {what}, MNN"] = "mnn", made / "mnn"
            files[f"ours, {what}, graph as exported"] = "plain", made / "onnx"
    found: dict[str, list[dict[str, float]]] = {name: [] for name in files}
    for _ in range(ROUNDS):
        for name, (engine, path) in files.items():
            found[name].append(run_worker(engine, path))
    table = Table("file", "tokens/s", "of builder", "load", "load peak", "size", "made with", title=shape, title_justify="left")
    base = max(one["rate"] for one in found["genai's builder, int4"])
    for name, runs in found.items():
        rate, load = max(one["rate"] for one in runs), min(one["load"] for one in runs)
        peak = min(one["peak"] for one in runs)
        size = sum(file.stat().st_size for file in files[name][1].iterdir() if file.name != "tokenizer.json")
        made_with = f"{memory[name] / 1e9:.2f} GB" if name in memory else ""
        row = (
            f"{rate:.1f}",
            f"{rate / base:.2f} x",
            f"{load:.2f} s",
            f"{peak / 1e9:.2f} GB",
            f"{size / 1e6:.1f} MB",
            made_with,
        )
        table.add_row(name, *row)
    Console(width=130).print(table)


def build_with_builder(model: Path, folder: Path) -> tuple[Path, int]:
    """The file that onnxruntime-genai's own builder makes at int4, and the peak memory it took."""
    needs, target = folder.parent / "builder-packages", folder / "builder"
    if not needs.exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(needs)]
        subprocess.run([*pip, BUILDER_NEEDS], check=True, stderr=subprocess.DEVNULL)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(target)]
    environment = {**os.environ, "PYTHONPATH": str(needs)}
    with (folder / "builder.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "-p", "int4", "-e", "cpu", "-c", str(folder / "cache")], env=environment, stdout=log, stderr=log
        )
        peak, _ = sample(process.pid, folder)
    if process.wait():
        raise SystemExit(f"the builder failed, see {folder / 'builder.log'}")
    return target, peak


def make(model: Path, folder: Path, bits: int, three_bit: str) -> tuple[Path, int]:
    """Our result, and the peak memory of every step that makes its folder for genai (comparing engines makes nothing)."""
    recipe = folder / f"q{bits}-{three_bit}.yaml"
    recipe.write_text(RECIPE.format(model=model, bits=bits, three_bit=three_bit), "utf-8")
    command = [sys.executable, "-m", "lowbit", "run", str(recipe), "--build", str(folder / "build")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    made = folder / "build" / recipe.stem
    steps = json.loads((made / "manifest.json").read_text("utf-8"))["steps"]
    compared = next(i for i, step in enumerate(steps) if step["name"] == "compare runtimes")
    return made, max(step["peak_rss_bytes"] for step in steps[:compared])


def run_worker(engine: str, path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.decode", "--worker", engine, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return dict(json.loads(output.splitlines()[-1]))


def timed(load: Callable[[], Any], start: Callable[[Any, list[int]], Callable[[], None]]) -> dict[str, float]:
    """Seconds to load, tokens per second, and the peak of memory that loading took beyond the libraries."""
    began = time.monotonic()
    before = peak_bytes()
    model = load()
    loaded = time.monotonic() - began
    peak = peak_bytes() - before
    step = start(model, np.random.default_rng(0).integers(1, 4000, PROMPT).tolist())
    step()
    began = time.monotonic()
    for _ in range(TOKENS):
        step()
    return {"load": loaded, "rate": TOKENS / (time.monotonic() - began), "peak": float(peak)}


def peak_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def run_genai(path: Path) -> dict[str, float]:
    import onnxruntime_genai as genai

    def start(model: Any, prompt: list[int]) -> Callable[[], None]:
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=PROMPT + TOKENS + 8, min_length=PROMPT + TOKENS + 8, do_sample=False)
        generator = genai.Generator(model, parameters)
        generator.append_tokens(np.array(prompt, np.int32))
        return generator.generate_next_token

    def load() -> Any:
        config = genai.Config(str(path))  # its default is one thread for each physical core
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": os.cpu_count()}}}}))
        return genai.Model(config)

    return timed(load, start)


def run_mnn(path: Path) -> dict[str, float]:
    import MNN.llm as llm

    def load() -> Any:
        model = llm.create(str(path / "config.json"))
        model.set_config({"thread_num": os.cpu_count(), "sampler_type": "greedy"})
        model.load()
        return model

    def start(model: Any, prompt: list[int]) -> Callable[[], None]:
        chosen = [int(np.argmax(model.forward(prompt).read()))]

        def step() -> None:
            chosen[0] = int(np.argmax(model.forward(chosen).read()))

        return step

    return timed(load, start)


def run_plain(path: Path) -> dict[str, float]:
    """The quantized graph as optimum exports it: past keys and values copied on every step."""
    from lowbit.pipeline.runtime.session import decoder_feeds, open_model

    def start(session: Any, prompt: list[int]) -> Callable[[], None]:
        names = [output.name for output in session.get_outputs()]
        state: dict[str, Any] = {"ids": np.array([prompt]), "past": {}}

        def step() -> None:
            results = dict(zip(names, session.run(names, decoder_feeds(session, state["ids"], state["past"])), strict=True))
            state["ids"] = results.pop("logits")[:, -1:].argmax(-1)
            state["past"] = {name.replace("present", "past_key_values"): value for name, value in results.items()}

        return step

    return timed(lambda: open_model(path / "model.onnx"), start)


ENGINES = {"genai": run_genai, "mnn": run_mnn, "plain": run_plain}


if __name__ == "__main__":
    main()
