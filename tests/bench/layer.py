"""Calibration at true size, one decoder layer of the 7B shape, 8 x 512 tokens: `python -m tests.bench.layer`.

Memory as in tests/bench/scale.py: anonymous and shared pages of the process and its children, the peak of the whole run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.bench.scale import sample
from tests.scale.checkpoint import write_checkpoint

LAYERS = 28
RECIPE = """\
model: {model}
calibrate: {{windows: 8, window: 512}}
passes:
  - narrow_embedding
  - quantize_matmul: {{bits: 4, block_size: 64, include: [lm_head]}}
  - quantize_matmul: {{bits: 3, block_size: 64, method: {method}, zero_point: {zero_point}}}
{then}
"""
CASES = (
    ("weighted_mse", "integer", ""),
    ("gptq", "integer", ""),
    ("refine", "integer", ""),
    ("refine", "float", ""),
    ("awq", "integer", "  - fold_channel_scales"),
)


def main() -> None:
    folder = Path("build/scale")
    write_checkpoint(folder / "7b-layer", "7b-layer", shards=1)
    print("| method, zero points | calibrate, one layer | 28 layers | peak memory |\n|---|---|---|---|")
    for method, zero_point, then in CASES:
        recipe, build = folder / f"layer-{method}.yaml", folder / "layer"
        model = (folder / "7b-layer").resolve()
        recipe.write_text(RECIPE.format(model=model, method=method, zero_point=zero_point, then=then), "utf-8")
        shutil.rmtree(build, ignore_errors=True)
        build.mkdir()
        command = [sys.executable, "-m", "lowbit", "run", str(recipe), "--build", str(build)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        memory, _ = sample(process.pid, build)
        if process.wait():
            raise SystemExit(f"the run of {recipe} failed")
        manifest = json.loads((build / recipe.stem / "manifest.json").read_text("utf-8"))
        seconds = sum(step["seconds"] for step in manifest["steps"] if step["name"] in ("channel scales", "calibrate"))
        name = method + then.replace("  -", ",")
        print(
            f"| {name}, {zero_point} | {seconds:.0f} s | {LAYERS * seconds / 3600:.1f} h | {memory / 1e9:.2f} GB |",
            flush=True,
        )
    shutil.rmtree(build)


if __name__ == "__main__":
    main()
