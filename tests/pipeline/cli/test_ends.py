"""How a command ends where nobody foresaw it: output that cannot be written, faults of lowbit's own and of plug-ins."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from lowbit.pipeline.cli.fault import tell_fault
from tests.tiny import recipe_text

ROOT = Path(__file__).parents[3]
FULL = Path("/dev/full")
PASS = """
import numpy as np
from lowbit.passes.base import Pass

class Broken(Pass):
    def apply(self, graph):
        return np.ones(3).reshape(2)
"""


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
@pytest.mark.parametrize("words", [("plan", "demo-q3"), ("schema",), ("--help",)])
def test_a_full_disk_under_stdout(words: tuple[str, ...]) -> None:
    with FULL.open("w") as full:
        command = [sys.executable, "-m", "lowbit", *words]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False, cwd=ROOT)
    assert done.stderr == "error: what was printed could not be written: No space left on device.\n"
    assert done.returncode == 1


@pytest.mark.parametrize("options", ["", "--json"])
def test_a_reader_that_goes_away(options: str, tmp_path: Path) -> None:
    # one that closes before anything is written, so that it does not depend on who is faster
    line = f"{sys.executable} -m lowbit plan demo-q3 {options} 2>errors | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert (tmp_path / "errors").read_text() == ""
    assert done.stdout == "1\n"


def test_a_plug_in_that_fails_is_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    package = tmp_path / "plugins" / "strange"
    package.mkdir(parents=True)
    (package / "broken.py").write_text(PASS, "utf-8")
    (tmp_path / "mine.yaml").write_text(recipe_text(tiny("llama"), "strange.broken"), "utf-8")
    (tmp_path / "build").mkdir()
    command = [sys.executable, "-m", "lowbit", "plan", "mine.yaml", "--plugins", "plugins"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    first, second = done.stderr.splitlines()
    assert first == "error: the plug-in strange.broken failed: ValueError: cannot reshape array of size 3 into shape (2,)"
    (report,) = (tmp_path / "build").iterdir()
    assert second == f"  {report} says where: report it to the plug-in's author with that file."
    text = report.read_text("utf-8")
    assert text.startswith("lowbit plan mine.yaml --plugins plugins\n")
    assert f"numpy {version('numpy')}\n" in text
    assert 'broken.py", line 7, in apply' in text


def test_a_fault_of_its_own_is_reported_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(*arguments: str) -> str:
        try:
            raise ZeroDivisionError("by zero")
        except ZeroDivisionError as error:
            return tell_fault(error, list(arguments))

    (tmp_path / "build").mkdir()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    said = fault("run", "x", f"--build={tmp_path / 'build'}")
    assert said.startswith("this is a fault of lowbit's own: ZeroDivisionError: by zero\n")
    (report,) = (tmp_path / "build").iterdir()
    assert f"{report} says where: report it with that file." in said
    assert "raise ZeroDivisionError" in report.read_text("utf-8")
    fault("run", "x", "--build", str(tmp_path / "no"))
    assert len(list((tmp_path / "temporary").iterdir())) == 1
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    said = fault("run", "x", "--build", str(tmp_path / "no"))
    assert "No report could be written" in said
    assert "Traceback" in said
