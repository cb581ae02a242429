"""Users without rights: what they may not read or write ends a run with a sentence, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.report.log import LOG
from tests.tiny import recipe_text

ROOT = Path(__file__).parents[2]
ATTEMPT = """
import json, os, sys
from pathlib import Path
from lowbit.passes.base import PassError
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.run.runner import run_recipe
from rich.console import Console

recipe, build = Path(sys.argv[1]), Path(sys.argv[2])
for name, mode in json.loads(sys.argv[3]):
    path = recipe.parent / name
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        run_recipe(load_recipe(recipe), build, None, Console(quiet=True))
        said = "done"
    except (PipelineError, PassError) as error:
        said = f"error: {error}"
    except Exception as error:
        said = f"bug: {type(error).__name__}: {error}"
    path.chmod(before)
    print(json.dumps([name, said]), flush=True)
"""
"""Runs a recipe again and again, each time without the right to one file or folder."""
BOUND = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []
"""Root without the privilege to pass over the modes of files: in child processes too, and its own folders stay its own."""

NOTHING, READ = 0o000, 0o500
CASES = [
    ("mine.yaml", NOTHING, r"mine\.yaml: cannot be read"),
    ("model", NOTHING, r"model/config\.json: cannot be read \(Permission denied\)\. Get the right to read it"),
    ("model/config.json", NOTHING, r"config\.json: cannot be read"),
    ("model/tokenizer.json", NOTHING, r"tokenizer\.json: .*Permission denied"),
    ("model/model.safetensors", NOTHING, r"model\.safetensors: cannot be read \(Permission denied\)"),
    ("build/mine", READ, r"build/mine/\.work-\w+: cannot write here \(Permission denied\)"),
    ("build/mine/run.log", READ & 0o400, r"run\.log: cannot write here"),
    ("build/mine/.lock", NOTHING, r"\.lock: cannot write here"),
    ("build/.store", READ, r"\.store/\S+: cannot write here"),
]
"""What is taken away, what is left of it, and what is said."""


def test_users_without_rights(tiny: Callable[..., Path], results: Callable[..., Path], tmp_path: Path) -> None:
    if BOUND and shutil.which(BOUND[0]) is None:
        pytest.skip("root passes over the modes of files, and setpriv is not installed")
    result = shutil.copytree(results("narrow_embedding", "quantize_matmul: {bits: 3, block_size: 32}"), tmp_path / "build/mine")
    (tmp_path / "build" / ".store").mkdir()
    shutil.copytree(tiny(), tmp_path / "model")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(recipe_text(tmp_path / "model", "quantize_matmul: {bits: 4}", convert=""), "utf-8")
    before = {path: path.read_bytes() for path in result.rglob("*") if path.is_file() and path.name not in (LOG, ".lock")}
    modes = json.dumps([(name, mode) for name, mode, _ in CASES])
    command = [*BOUND, sys.executable, "-c", ATTEMPT, str(recipe), str(tmp_path / "build"), modes]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    said = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _ in said] == [name for name, _, _ in CASES]
    for (name, sentence), (_, _, message) in zip(said, CASES, strict=True):
        assert sentence.startswith("error: "), name
        assert re.search(message, sentence), (name, sentence)
    assert {path: path.read_bytes() for path in before} == before
    assert not list(result.glob(".work-*"))
    check_folder(result)
