"""Killed at random moments, or stopped at every entry, a run goes on where it was and ends with the very bytes of an
undisturbed one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.store.store import Draft, Entry, Store
from tests.conftest import CORES
from tests.running import know_export, run_in_process
from tests.scale.checkpoint import write_checkpoint

ROOT = Path(__file__).parents[3]
MANY = """\
model: {model}
calibrate: {{windows: 8, window: 64}}
passes:
  - narrow_embedding
  - quantize_matmul: {{bits: 4, block_size: 64, include: [lm_head, '*.o_proj']}}
  - quantize_matmul: {{bits: 3, block_size: 64, method: mse, include: ['*.down_proj']}}
  - quantize_matmul: {{bits: 2, block_size: 64, method: refine}}
  - finetune_blocks: {{epochs: 1, batch: 4, include: ['model.layers.[12].*']}}
validate: {{windows: 2, window: 128}}
convert: {{}}
"""


FEW = """\
model: {model}
calibrate: {{windows: 4, window: 32, text: {text}}}
passes:
  - narrow_embedding
  - quantize_matmul: {{bits: 4, block_size: 64, include: [lm_head, '*.[qkv]_proj']}}
  - quantize_matmul: {{bits: 3, block_size: 64, method: mse, include: ['*.down_proj']}}
  - quantize_matmul: {{bits: 2, block_size: 64, method: refine, include: ['*.o_proj', '*.up_proj']}}
  - finetune_blocks: {{epochs: 1, batch: 4, include: ['*.mlp.*']}}
validate: {{windows: 1, window: 32, text: {text}}}
convert: {{target: onnxruntime-genai}}
"""
"""Every kind of entry, few of each."""


@pytest.fixture(scope="module")
def few(tiny: Callable[..., Path], text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("few") / "mine.yaml"
    path.write_text(FEW.format(model=tiny("llama", num_hidden_layers=1), text=text), "utf-8")
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    write_checkpoint(folder / "model", "small")
    path = folder / "mine.yaml"
    path.write_text(MANY.format(model=folder / "model"), "utf-8")
    return path


def start(recipe: Path, build: Path, seed: str = "1", cores: int = 2) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "lowbit", "run", str(recipe), "--build", str(build)]
    silence: Any = subprocess.DEVNULL
    environment = {**os.environ, "PYTHONHASHSEED": seed}
    process = subprocess.Popen(command, cwd=ROOT, stdout=silence, stderr=silence, env=environment)
    os.sched_setaffinity(process.pid, CORES[:cores])
    return process


def files(build: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((build / "mine" / "manifest.json").read_text("utf-8"))["files"]
    return {name: sha for name, sha in found.items() if name != "report.html"}  # it tells how long the steps took


def entries(build: Path) -> dict[Path, int]:
    """Finished results of the store and when each was written."""
    return {p.parent: p.stat().st_mtime_ns for p in (build / ".store").glob("*/*/entry.json")}


@pytest.mark.parametrize(("kind", "kills"), [("few", 3), pytest.param("many", 10, marks=pytest.mark.slow)])
def test_the_same_bytes_on_one_core_or_two_and_after_kills(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, kills: int
) -> None:
    recipe: Path = request.getfixturevalue(kind)
    undisturbed, one_core, killed = (tmp_path / name for name in ("undisturbed", "one", "killed"))
    for build in (undisturbed, one_core, killed):
        know_export(load_recipe(recipe), Store(build / ".store"))
    begun = time.monotonic()
    assert start(recipe, undisturbed).wait() == 0
    whole = time.monotonic() - begun
    assert start(recipe, one_core, seed="2", cores=1).wait() == 0
    assert files(one_core) == files(undisturbed)

    chance = random.Random(0)
    kept: dict[Path, int] = {}
    for _ in range(kills):
        process = start(recipe, killed)
        time.sleep(chance.uniform(0.1, 0.9) * whole)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "mine" / "onnx").exists() or (killed / "mine" / "manifest.json").exists()
        now = entries(killed)
        assert kept.items() <= now.items(), "what was finished is neither made again nor lost"
        kept = now
    assert start(recipe, killed).wait() == 0
    assert kept.items() <= entries(killed).items()
    assert files(killed) == files(undisturbed)
    assert check_folder(killed / "mine") == check_folder(undisturbed / "mine")
    assert not list((killed / ".store").glob(".tmp-*"))
    assert not list((killed / "mine").glob(".work-*"))


class Stop(BaseException):
    """What nobody catches."""


@dataclass(frozen=True)
class Stopping(Store):
    """A store that keeps one more entry, and stops the run where it would finish the next."""

    kept: list[str] = field(default_factory=list)

    def finish(self, key: str, draft: Draft) -> Entry:
        if not self.has(key):
            if self.kept:
                raise Stop
            self.kept.append(key)
        return super().finish(key, draft)


def test_a_run_may_stop_at_every_entry(few: Path, tmp_path: Path) -> None:
    """Stopped where each entry is written, one after the other: each run keeps one more, and the bytes are the same."""
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    run_in_process(load_recipe(few), undisturbed)
    whole = entries(undisturbed)
    kept: dict[Path, int] = {}
    for number in range(1, len(whole)):
        with pytest.raises(Stop):
            run_in_process(load_recipe(few), stopped, store=Stopping(stopped / ".store"))
        assert not (stopped / "mine" / "manifest.json").exists()
        now = entries(stopped)
        assert kept.items() <= now.items()
        assert len(now) == number
        kept = now
    run_in_process(load_recipe(few), stopped, store=Stopping(stopped / ".store"))
    assert {entry.name for entry in entries(stopped)} == {entry.name for entry in whole}
    assert files(stopped) == files(undisturbed)
