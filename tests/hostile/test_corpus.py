"""Every file of the corpus is refused with a sentence, reads nothing outside its folder, and takes little."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.hostile import corpus_checkpoints, corpus_onnx  # noqa: F401  (their cases)
from tests.hostile.corpus import CASES
from tests.sharing import once


@pytest.fixture(scope="session")
def outcomes(tiny: Callable[..., Path], shared: Path) -> dict[str, Any]:
    def run(scratch: Path) -> None:
        scratch.mkdir()
        command = [sys.executable, "-m", "tests.hostile.run", str(tiny("llama")), str(scratch), str(scratch / "results.json")]
        subprocess.run(command, check=True, timeout=1200)

    return dict(json.loads((once(shared / "hostile", run) / "results.json").read_text("utf-8")))


def test_there_are_three_hundred_at_least() -> None:
    assert len(CASES) >= 300


@pytest.mark.parametrize("name", CASES)
def test_refused_with_a_sentence(outcomes: dict[str, Any], name: str) -> None:
    found = outcomes[name]
    assert found["kind"] == "refused", found
    assert re.search(CASES[name][1], found["text"]), found["text"]
    assert not found["canary"], "it was read"
    assert not found["ran"], "code was run"
    assert "canary: nobody may read this" not in found["text"]


@pytest.mark.parametrize("name", sorted(CASES)[::70])
def test_the_command_line_says_the_same(tiny: Callable[..., Path], tmp_path: Path, name: str) -> None:
    make, message = CASES[name]
    folder = tmp_path / "case"
    folder.mkdir()
    command = [sys.executable, "-m", "lowbit", "run", str(make(folder, tiny("llama"))), "--build", str(folder / "build")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=folder)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 2, said
    assert re.search(message, said), said
    assert "Traceback" not in said
    assert not (folder / "ran").exists()
