"""Every target takes its first seed, and refuses the others and what was found before with a sentence; a bug is found."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.__main__ import TARGETS, fuzz, module_of
from tests.fuzz.target import ALLOWED, Target

FOUND = Path(__file__).parent / "found"
"""Inputs that once let out something else, by target; each is named after what it is."""

BROKEN = """
from tests.fuzz.target import Target

def prepare(folder):
    def attempt(data):
        if b"{" in data:
            raise KeyError(data)

    return Target([b"goodz"], attempt)
"""


def prepare(name: str, folder: Path) -> Target:
    return importlib.import_module(module_of(name)).prepare(folder)


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_right_passes_and_what_was_found_is_refused(tmp_path: Path, name: str) -> None:
    target = prepare(name, tmp_path)
    target.attempt(target.seeds[0])
    for data in target.seeds[1:]:
        with contextlib.suppress(ALLOWED):
            target.attempt(data)
    for file in sorted((FOUND / name).glob("*")):
        with pytest.raises(ALLOWED):
            target.attempt(file.read_bytes())


def test_every_finding_belongs_to_a_target() -> None:
    assert {folder.name for folder in FOUND.iterdir()} <= set(TARGETS)


def test_a_bug_is_found_kept_and_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("atheris")
    (tmp_path / "broken_target.py").write_text(BROKEN, "utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path.cwd())]))
    result = fuzz("broken_target", 20, tmp_path / "work")
    assert "KeyError" in result.failure
    (finding,) = result.findings
    assert b"{" in finding.read_bytes()
    command = [sys.executable, "-m", "tests.fuzz.harness", "broken_target", str(tmp_path / "work"), str(finding)]
    replayed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert replayed.returncode != 0
    assert "KeyError" in replayed.stdout
