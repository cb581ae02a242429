"""Quality of every method at 4, 3 and 2 bits: `python -m tests.bench.accuracy [--blocks 64] [--bits 3 2]`, markdown tables.

First how far the demo model is from its float self: all decoder layers at the given bits and block, lm_head at 4 bits in the
same block (by the same method where it is calibrated, by rtn otherwise), the first 60 windows of 512 tokens of Python's
help topics, figures at accuracy_level 0. Calibration text are docstrings of the standard library, never the evaluation's.
Then how many of 200 problems the reasoning model still gets right, decoded greedily in onnxruntime.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lowbit.passes import methods
from lowbit.passes.registry import names_in
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.run.runner import run_recipe
from tests.bench.reasoning import MODEL as REASONER
from tests.bench.reasoning import accuracy, problems

PYDOCS = Path(__file__).parents[1] / "models" / "qwen2-pydocs"
RECIPE = """\
model: {model}
{calibrate}
passes:
  - narrow_embedding
  - quantize_matmul: {{bits: 4, block_size: {block}, include: [lm_head], method: {head}, zero_point: {zero_point}}}
  - quantize_matmul: {{bits: {bits}, block_size: {block}, method: {method}, zero_point: {zero_point}}}
{then}
{more}
"""


@dataclass(frozen=True)
class Case:
    """A row of the tables: a method, for lm_head another, what it is calibrated on, the pass after it, kind of zero point."""

    name: str
    method: str
    head: str = "rtn"
    calibrate: str = ""
    then: str = ""
    zero_point: str = "integer"


OWN = "calibrate: {windows: 256"
FREE = "float zero points"
BY_SIGNS = "  - finetune_blocks: {optimizer: sign, epochs: 6, scale_learning_rate: 0.005, exclude: [lm_head]}"
BOTH = "  - finetune_blocks: {end_to_end: 2}"
CASES = (
    Case("rtn", "rtn"),
    Case("mse", "mse"),
    Case("hqq", "hqq"),
    Case(f"mse, {FREE}", "mse", zero_point="float"),
    Case(f"hqq, {FREE}", "hqq", zero_point="float"),
    Case("awq, fold_channel_scales", "awq", "awq", OWN + "}", "  - fold_channel_scales"),
    Case("weighted_mse", "weighted_mse", "weighted_mse", OWN + "}"),
    Case("gptq, each layer for itself", "gptq", "gptq", OWN + ", asymmetric: false}"),
    Case("gptq", "gptq", "gptq", OWN + "}"),
    Case("signround", "signround", "signround", OWN + "}"),
    Case("refine", "refine", "refine", OWN + "}"),
    Case("refine, lm_head by rtn", "refine", "rtn", OWN + "}"),
    Case("rtn, then finetune_blocks by signs", "rtn", "rtn", OWN + "}", BY_SIGNS),
    Case("refine, then finetune_blocks", "refine", "refine", OWN + "}", BOTH),
    Case(f"refine, {FREE}", "refine", "refine", OWN + "}", zero_point="float"),
    Case(f"refine, {FREE}, then finetune_blocks", "refine", "refine", OWN + "}", BOTH, "float"),
)


class Bench:
    """Runs recipes in a scratch folder, whose results are recalled from case to case."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch

    def run(self, case: Case, model: Path, bits: int, block: int, more: str) -> tuple[Path, dict[str, Any]]:
        """The folder of a finished run and its manifest."""
        path = self.scratch / "case.yaml"
        text = RECIPE.format(
            model=model, calibrate=case.calibrate, block=block, head=case.head, bits=bits, method=case.method,
            then=case.then, zero_point=case.zero_point, more=more,
        )  # fmt: skip
        path.write_text(text, "utf-8")
        folder = run_recipe(load_recipe(path), self.scratch / "build", None, Console(quiet=True))
        return folder, json.loads((folder / "manifest.json").read_text("utf-8"))


def divergences(bench: Bench, all_bits: list[int], blocks: list[int]) -> None:
    """The tables of the demo model, one for each block size."""
    for block in blocks:
        print(f"blocks of {block}: KL (nats/token), perplexity, same top token, seconds to quantize\n")
        print("| method | " + " | ".join(f"{bits} bits" for bits in all_bits) + " |")
        print("|---" * (1 + len(all_bits)) + "|")
        sizes: dict[str, dict[int, str]] = {}
        for case in CASES:
            cells = []
            for bits in all_bits:
                folder, found = bench.run(case, PYDOCS, bits, block, "validate: {windows: 60}")
                quality = found["quality"]["onnxruntime"]
                steps = ("channel scales", "calibrate", "finetune", "write onnx")
                seconds = sum(step["seconds"] for step in found["steps"] if step["name"] in steps)
                scores = f"{quality['kl_divergence']:.4f}, {quality['perplexity']:.2f}, {quality['top1_agreement']:.1%}"
                cells.append(f"{scores}, {seconds:.0f} s")
                data = (folder / "onnx" / "model.onnx.data").stat().st_size / 1e6
                size = f"{bits} bits: {found['size']['bits_per_weight']:.3f} bits per weight, {data:.2f} MB"
                sizes.setdefault(case.zero_point, {}).setdefault(bits, size)
            print(f"| {case.name} | {' | '.join(cells)} |", flush=True)
        for zero_point, known in sizes.items():
            print(f"\n{zero_point} zero points: {'; '.join(known.values())}")
        print(f"\nfloat model: perplexity {quality['reference_perplexity']:.2f}\n", flush=True)


def answers(bench: Bench, all_bits: list[int]) -> None:
    """The table of the reasoning model, blocks of 64."""
    alone = "\n---\n".join(question for question, _ in problems(64, seed=1))
    (bench.scratch / "problems.txt").write_text(alone, "utf-8")
    (bench.scratch / "only.txt").write_text("".join(question for question, _ in problems(8000, seed=2)), "utf-8")
    text = "calibrate: {{text: {}, windows: 320, window: 160}}"
    cases = (
        *CASES[:2],
        Case("refine, calibrated on problems alone", "refine", "refine", text.format("only.txt")),
        Case("refine, calibrated on its own reasoning", "refine", "refine", text.format("generated, prompts: problems.txt")),
    )
    print("| right of 200 | " + " | ".join(f"{bits} bits" for bits in all_bits) + " |")
    print("|---" * (1 + len(all_bits)) + "|")
    for case in cases:
        cells = [f"{accuracy(bench.run(case, REASONER, bits, 64, '')[0] / 'onnx' / 'model.onnx'):.1%}" for bits in all_bits]
        print(f"| {case.name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--blocks", type=int, nargs="+", default=[64, 32, 128])
    options = parser.parse_args()
    assert {case.method for case in CASES} == set(names_in(methods)), "a new method wants a row"
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        divergences(bench, options.bits, options.blocks)
        answers(bench, options.bits)


if __name__ == "__main__":
    main()
