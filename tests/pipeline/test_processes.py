"""Workers end with the program that asked for them, however that ends."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from lowbit.pipeline.processes import run_worker
from tests.tiny import recipe_text

ROOT = Path(__file__).parents[2]
BUSY = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'while True: pass']); exec('while True: pass')"
"""A worker that listens to nobody, and has started another process."""
PARENT = f"""
import time
from lowbit.pipeline.processes import start_worker
worker = start_worker("-c", {BUSY!r})
time.sleep(600)
"""


def until(done: Callable[[], bool], seconds: float = 30) -> bool:
    """Whether it is, within some time."""
    deadline = time.monotonic() + seconds
    while not done() and time.monotonic() < deadline:
        time.sleep(0.02)
    return done()


def alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a worker ends by itself")
def test_a_worker_ends_with_a_program_that_is_killed() -> None:
    program = subprocess.Popen([sys.executable, "-c", PARENT], cwd=ROOT)
    started = psutil.Process(program.pid)
    assert until(lambda: len(started.children(recursive=True)) == 2)
    workers = started.children(recursive=True)
    assert all(map(alive, workers))
    program.kill()
    program.wait()
    assert until(lambda: not any(map(alive, workers)), 5)


def test_a_worker_that_takes_too_long_is_gone() -> None:
    before = set(psutil.Process().children())
    with pytest.raises(subprocess.TimeoutExpired):
        run_worker("-c", "while True: pass", seconds=0.3)
    assert set(psutil.Process().children()) <= before
    done = run_worker("-c", "import sys; print('é'); print(3, file=sys.stderr); sys.exit(4)")
    assert (done.stdout, done.stderr, done.returncode) == ("é\n", "3\n", 4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_no_process(tiny: Callable[..., Path], tmp_path: Path, number: signal.Signals) -> None:
    recipe, build = tmp_path / "mine.yaml", tmp_path / "build"
    recipe.write_text(recipe_text(tiny("llama"), "remove_identities"), "utf-8")
    command = [sys.executable, "-m", "lowbit", "run", str(recipe), "--build", str(build)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    started = psutil.Process(run.pid)

    def exporting() -> bool:
        return any("isolate" in " ".join(child.cmdline()) for child in started.children())

    assert until(exporting)
    workers = started.children(recursive=True)
    run.send_signal(number)
    if number == signal.SIGTERM:
        run.send_signal(number)  # as `timeout` does
    _, errors = run.communicate(timeout=30)
    assert until(lambda: not any(map(alive, workers)), 5)
    assert "Traceback" not in errors
    if number == signal.SIGKILL:
        assert run.returncode == -signal.SIGKILL
    else:
        assert run.returncode == 128 + number
        assert errors == "\nstopped. What was finished is kept: run again to go on.\n"
        assert not list((build / "mine").glob(".work-*"))
        assert not list((build / ".store").glob(".tmp-*"))
