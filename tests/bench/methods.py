"""Size and quality of every method at 4, 3 and 2 bits on the demo model: one markdown table.

All decoder layers at the given bits in blocks of 64, lm_head at 4 bits by round to nearest; the first 60 windows of
512 tokens of Python's help topics; figures at accuracy_level 0.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rich.console import Console

from passes import methods
from passes._registry import names_in
from pipeline.recipe import load_recipe
from pipeline.runner import run_recipe

MODEL = Path(__file__).parents[1] / "models" / "qwen2-pydocs"
RECIPE = """\
model: {model}
passes:
  - narrow_embedding
  - quantize_matmul: {{bits: 4, block_size: 64, include: [lm_head]}}
  - quantize_matmul: {{bits: {bits}, block_size: 64, method: {method}}}
validate: {{windows: 60}}
"""
ORDER = ("rtn", "mse", "hqq")


def main() -> None:
    print(
        "| bits | method | bits per weight | ONNX data | perplexity | KL (nats/token) | same top token | mean squared error |"
    )
    print("|---|---|---|---|---|---|---|---|")
    assert sorted(ORDER) == names_in(methods), "a new method wants a row"
    with tempfile.TemporaryDirectory() as scratch:
        reference = 0.0
        for bits in (4, 3, 2):
            for method in ORDER:
                path = Path(scratch) / f"q{bits}-{method}.yaml"
                path.write_text(RECIPE.format(model=MODEL, bits=bits, method=method), "utf-8")
                folder = run_recipe(load_recipe(path), Path(scratch) / "build", None, Console(quiet=True))
                found = json.loads((folder / "manifest.json").read_text("utf-8"))
                quality, weights = found["quality"]["onnxruntime"], found["weights"].values()
                reference = quality["reference_perplexity"]
                count = sum(w["shape"][0] * w["shape"][1] for w in weights)
                mse = sum(w["mse"] * w["shape"][0] * w["shape"][1] for w in weights) / count
                size = (folder / "onnx" / "model.onnx.data").stat().st_size
                print(
                    f"| {bits} | {method} | {found['size']['bits_per_weight']:.3f} | {size / 1e6:.2f} MB "
                    f"| {quality['perplexity']:.2f} | {quality['kl_divergence']:.4f} "
                    f"| {quality['top1_agreement']:.1%} | {mse:.1e} |",
                    flush=True,
                )
        print(f"\nfloat model: perplexity {reference:.2f}, bf16 13.64 MB")


if __name__ == "__main__":
    main()
