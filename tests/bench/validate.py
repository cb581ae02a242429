"""Time of validation beside plain passes of the float model in onnxruntime: `python -m tests.bench.validate --model FOLDER`.

For each width and kind of zero point the reference, plain rounding and the candidate, each in exact arithmetic with its
scores, against three passes of one float32 session over the same tokens, in the same process; the as-run pass stands apart.
Sessions are opened inside of what is timed here; of the plain passes only the runs count.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.resolve import open_model
from lowbit.pipeline.export.bind import load_graph
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.run.runner import run_recipe
from lowbit.pipeline.runtime.session import decoder_feeds, open_reference
from lowbit.pipeline.validate.dataset import token_windows
from lowbit.pipeline.validate.reference import write_reference
from lowbit.pipeline.validate.text import compare

RECIPE = """\
model: {model}
passes:
  - remove_identities
  - narrow_embedding
  - quantize_matmul: {{bits: {bits}, block_size: 64, zero_point: {zero_point}}}
"""
Seconds = tuple[float, float]
"""By the clock, and of every core together."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("build/bench-validate"))
    parser.add_argument("--windows", type=int, default=4, help="windows of 512 tokens")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    model = options.model.resolve()
    table = Table("codes", "three plain passes", "ours, all three", "ratio", "ratio of core seconds", "as it runs")
    for bits in (2, 3, 4):
        for zero_point in ("integer", "float"):
            row = _row(model, options.folder, options.windows, bits, zero_point)
            print(*row, sep="  |  ", flush=True)
            table.add_row(*row)
    Console(width=130).print(table)


def _row(model: Path, folder: Path, windows: int, bits: int, zero_point: str) -> tuple[str, ...]:
    name = f"q{bits}-{zero_point}"
    recipe = folder / f"{name}.yaml"
    recipe.write_text(RECIPE.format(model=model, bits=bits, zero_point=zero_point), "utf-8")
    loaded = load_recipe(recipe)
    run_recipe(loaded, folder, None, console=Console(quiet=True))
    checkpoint, candidate = open_model(str(model)), folder / name / "onnx" / "model.onnx"
    graph_file = next((folder / ".store").glob("*/*/model.onnx"))
    ids = token_windows(loaded, checkpoint)[:windows]
    plain = _plain(graph_file, checkpoint, ids)
    hidden = folder / "hidden.npy"

    def measured(as_run: bool) -> None:
        compare(graph_file, checkpoint, hidden, candidate, ids, lambda done: None, as_run)

    reference = _timed(lambda: write_reference(graph_file, checkpoint, ids, hidden, lambda done: None))
    exact, again = _timed(lambda: measured(False)), _timed(lambda: measured(False))  # plain rounding is as much work
    with_own = _timed(lambda: measured(True))
    ours = tuple(map(sum, zip(reference, exact, again, strict=True)))
    shutil.rmtree(folder / name)
    ratios = [f"{mine / 3 / theirs:.2f}" for mine, theirs in zip(ours, plain, strict=True)]
    return name, f"{3 * plain[0]:.1f} s", f"{ours[0]:.1f} s", *ratios, f"{with_own[0] - again[0]:.1f} s"


def _plain(graph_file: Path, checkpoint: Checkpoint, ids: np.ndarray) -> Seconds:
    """One pass of the float model, window by window, after a first run that is not timed."""
    session = open_reference(load_graph(graph_file, checkpoint))
    feeds = [decoder_feeds(session, window[None]) for window in ids]
    session.run(["logits"], feeds[0])
    return _timed(lambda: [session.run(["logits"], feed) for feed in feeds])


def _timed(work: Callable[[], object]) -> Seconds:
    before, start = os.times(), time.monotonic()
    work()
    after = os.times()
    return time.monotonic() - start, after.user + after.system - before.user - before.system


if __name__ == "__main__":
    main()
