"""Mixed bits against uniform ones at the same size: `python -m tests.bench.fit`, a markdown table.

The demo model, codes by `mse`, sizes as MNN's file has them (an offset and a scale for each block), 60 windows of 512 tokens of
Python's help topics. Damage is measured on docstrings, never on those.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.run.runner import run_recipe
from tests.conftest import PYDOCS

RECIPE = """\
model: {model}
passes:
  - narrow_embedding
  - {entry}
validate: {{windows: 60}}
convert: {{}}
"""
UNIFORM = "quantize_matmul: {{bits: {bits}, block_size: {block}, method: mse}}"
MIXED = "allocate_bits: {{bits_per_weight: {budget}, method: mse, sensitivity: {by}}}"
ROWS = (
    ("4 bits, block 64", UNIFORM.format(bits=4, block=64)),
    ("chosen, 4.5 bits", MIXED.format(budget=4.5, by="kl")),
    ("3 bits, block 64", UNIFORM.format(bits=3, block=64)),
    *((f"chosen, 3.5 bits, {by}", MIXED.format(budget=3.5, by=by)) for by in ("kl", "fisher", "output_mse", "weight_mse")),
    ("3 bits, block 128", UNIFORM.format(bits=3, block=128)),
    *((f"chosen, 3.25 bits, {by}", MIXED.format(budget=3.25, by=by)) for by in ("kl", "fisher")),
    ("2 bits, block 64", UNIFORM.format(bits=2, block=64)),
    *((f"chosen, 2.5 bits, {by}", MIXED.format(budget=2.5, by=by)) for by in ("kl", "fisher", "output_mse", "weight_mse")),
    *((f"chosen, 2.75 bits, {by}", MIXED.format(budget=2.75, by=by)) for by in ("kl", "fisher")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path("build/fit"))
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    print("| | MNN's weights | KL, nats per token | perplexity |\n|---|---|---|---|")
    for number, (name, entry) in enumerate(ROWS):
        path = folder / f"row{number}.yaml"
        path.write_text(RECIPE.format(model=PYDOCS, entry=entry), "utf-8")
        made = run_recipe(load_recipe(path), folder / "build", None, Console(quiet=True))
        quality = json.loads((made / "manifest.json").read_text("utf-8"))["quality"]["onnxruntime"]
        size = (made / "mnn" / "llm.mnn.weight").stat().st_size
        row = f"{size / 1e6:.3f} MB | {quality['kl_divergence']:.4f} | {quality['perplexity']:.2f}"
        print(f"| {name} | {row} |", flush=True)


if __name__ == "__main__":
    main()
