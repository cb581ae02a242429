"""Every hostile recipe is refused with a sentence, soon, in this process and by the real command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lowbit.passes.base import PassError
from lowbit.pipeline.commands.plan import make_plan
from lowbit.pipeline.errors import PipelineError, RecipeError
from lowbit.pipeline.recipe.load import load_recipe
from tests.hostile.recipes import LOADED, RECIPES

SECONDS = 2
"""What is not refused by then hangs."""
COMMANDS = ("digits decimal", "unseen character pass 1b", "many in a line", "model markup")
"""Each of these takes seconds to start."""


def write(folder: Path, content: bytes) -> Path:
    path = folder / "mine.yaml"
    path.write_bytes(content)
    return path


def test_there_are_a_hundred_at_least() -> None:
    assert len(RECIPES) + len(LOADED) >= 100


@pytest.mark.parametrize("name", RECIPES)
def test_refused_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = RECIPES[name]
    path = write(tmp_path, content)
    began = time.thread_time()
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    assert time.thread_time() - began < SECONDS
    assert re.match(rf"{re.escape(str(path))}(:\d+:\d+)?: ", str(error.value))
    assert os.listdir(tmp_path) == ["mine.yaml"], "nothing ran"  # noqa: PTH208


@pytest.mark.parametrize("name", LOADED)
def test_a_plan_of_what_cannot_be_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = write(tmp_path, LOADED[name][0])
    with pytest.raises((PipelineError, PassError)):
        make_plan(load_recipe(path), tmp_path / "build", None)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device", "link to itself", "link to nothing"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "mine.yaml"
    match kind:
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "device":
            path.symlink_to("/dev/zero")
        case "link to itself":
            path.symlink_to(path)
        case _:
            path.symlink_to(tmp_path / "nothing")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(path)


@pytest.mark.parametrize("name", COMMANDS)
def test_by_the_command_line(tmp_path: Path, name: str) -> None:
    write(tmp_path, {**RECIPES, **LOADED}[name][0])
    command = [sys.executable, "-P", "-m", "lowbit", "plan", "mine.yaml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert "\x1b" not in done.stderr
    assert "Traceback" not in done.stderr
