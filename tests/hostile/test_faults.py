"""What the machine does to a run: engines that crash or hang, workers that are killed, disks that refuse. A sentence, a
status, nothing lost, and the next run is fine. (SIGKILL of the whole run: test_resume.py; full disks: test_end_to_end.py.)"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from rich.console import Console

from lowbit.pipeline.checkpoint.onnx_model import open_onnx
from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.convert import engine_process
from lowbit.pipeline.convert.engine_process import run_module
from lowbit.pipeline.convert.mnn import converter
from lowbit.pipeline.errors import ConvertError, PipelineError
from lowbit.pipeline.onnx_io.reader import read_model
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.runtime.isolate import isolated
from lowbit.pipeline.store.store import Store
from tests.running import know_export, run_in_process
from tests.tiny import recipe_text

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
HANG = "import time; time.sleep(600)"


@pytest.fixture
def recipe(tiny: Callable[..., Path], text: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    validate = f"validate: {{window: 64, windows: 2, text: {text}, max_kl_divergence: 100}}"
    path.write_text(
        recipe_text(tiny("llama"), "narrow_embedding", "quantize_matmul: {bits: 4, block_size: 32}", validate=validate)
    )
    return path


def files(build: Path) -> dict[str, str]:
    found = json.loads((build / "mine" / "manifest.json").read_text("utf-8"))["files"]
    return {name: sha for name, sha in found.items() if name != "report.html"}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (CRASH, r"MNN's converter made no .* \(status -11\)"),
        (HANG, "in 1 s and was stopped"),
        ("pass", r"made no .* \(status 0\)"),
    ],
)
def test_a_converter_that_fails(
    recipe: Path, tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch, call: str, message: str
) -> None:
    build = tmp_path / "build"
    run_in_process(load_recipe(recipe), build, store)
    before = files(build)
    recipe.write_text(recipe.read_text().replace("bits: 4", "bits: 3"))
    (tmp_path / "_tools.py").write_text(f"def mnnconvert(arguments):\n    {call}\n")
    with monkeypatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))  # where MNN's converter is looked for first
        patch.setattr(converter, "SECONDS", 1)
        with pytest.raises(ConvertError, match=message):
            run_in_process(load_recipe(recipe), build, store)
    assert files(build) == before  # the old result is whole
    check_folder(build / "mine")
    assert not list((build / "mine").glob(".work-*"))
    run_in_process(load_recipe(recipe), build, store)  # and the next run is fine
    assert files(build) != before
    check_folder(build / "mine")


def test_an_engine_that_hangs_or_crashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "bad"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "hang.py").write_text(HANG)
    (package / "crash.py").write_text(CRASH)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(engine_process, "SECONDS", 2)
    with pytest.raises(ConvertError, match="MNN did not finish folder in 2 s"):
        run_module("MNN", "bad.hang", Path("folder"), tmp_path / "request", tmp_path / "result")
    with pytest.raises(ConvertError, match=r"MNN failed on folder \(status -11\)"):
        run_module("MNN", "bad.crash", Path("folder"), tmp_path / "request", tmp_path / "result")


def take_memory() -> int:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 33, 1 << 33))
    return len(bytearray(1 << 40))


def be_killed() -> None:
    os.kill(os.getpid(), 9)


def test_a_worker_without_memory() -> None:
    with pytest.raises(MemoryError):
        isolated(take_memory)
    with pytest.raises(PipelineError, match="the process for be_killed was killed, most likely for lack of memory"):
        isolated(be_killed)


def command(recipe: Path, build: Path, store: Store, code: str = "") -> subprocess.CompletedProcess[str]:
    start = f"{code}\nfrom lowbit.pipeline.__main__ import main\nmain()"
    arguments = [sys.executable, "-c", start, "run", str(recipe), "--build", str(build), "--store", str(store.root)]
    return subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)


def test_statuses_of_the_command_line(recipe: Path, tmp_path: Path, store: Store) -> None:
    """0 done, 1 our own fault, 2 a mistake or a missed gate; 130 Ctrl-C (test_runner.py), 143 SIGTERM (test_processes.py)."""
    build = tmp_path / "build"
    know_export(load_recipe(recipe), store)
    assert command(recipe, build, store).returncode == 0
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(recipe.read_text().replace("bits: 4", "bits: 5"))
    done = command(wrong, build, store)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {wrong}:")
    assert "Traceback" not in done.stderr
    missed = tmp_path / "mine.yaml"
    missed.write_text(recipe.read_text().replace("max_kl_divergence: 100", "max_kl_divergence: 0.000001"))
    done = command(missed, build, store)
    assert done.returncode == 2
    assert "gate missed" in done.stderr
    check_folder(build / "mine")
    bug = "import lowbit.pipeline.run.runner as r\nr.publish = lambda *a: 1 / 0\n"
    done = command(missed, build, store, bug)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    check_folder(build / "mine")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes where it likes; tests/pipeline/test_store.py tests the sentence")
def test_a_disk_that_cannot_be_written_to(recipe: Path, tmp_path: Path) -> None:
    sealed = tmp_path / "sealed"
    sealed.mkdir(mode=0o500)
    with pytest.raises(PipelineError, match="cannot write here"):
        run_in_process(load_recipe(recipe), sealed / "build")


@pytest.mark.parametrize("read", [lambda file: open_onnx(file, "m").graph(), read_model])
def test_a_graph_above_two_gigabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Callable[[Path], object]) -> None:
    """Of protobuf, which would read all of it before it said no."""
    file = tmp_path / "model.onnx"
    with file.open("wb") as stream:
        stream.truncate(1 << 31)
    monkeypatch.setattr(onnx, "load", lambda *_, **__: pytest.fail("it was read"))
    with pytest.raises(PipelineError, match=r"model.onnx: has 2,147,483,648 bytes, .*2,147,483,647"):
        read(file)
