"""A Python program in a process of its own, which ends when this process does, however that ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import weakref
from typing import Any


def start_worker(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """`python -P ARGUMENTS`, started; it is killed when this process ends.

    The worker has the reading end of a pipe, of which nobody but this process has the other end. Linux kills the worker, with
    what it started, when that end closes: also where this process got a SIGKILL, and where the worker computes and listens to
    nobody. Elsewhere a worker ends by itself, with what it was asked for.

    Args:
        options: those of `subprocess.Popen`.
    """
    reading, writing = os.pipe()
    try:
        # a group of its own: Ctrl-C is for us
        process = subprocess.Popen(
            [sys.executable, "-P", *arguments], pass_fds=(reading,), process_group=0, text=True, encoding="utf-8",
            errors="replace", **options,
        )  # fmt: skip
    except BaseException:
        os.close(writing)
        raise
    else:
        weakref.finalize(process, os.close, writing)
        _kill_at_end(process.pid, reading)
    finally:
        os.close(reading)
    return process


def _kill_at_end(group: int, reading: int) -> None:
    """Let the kernel kill a group of processes when the other end of a pipe that it holds closes."""
    if sys.platform != "linux":  # nobody else sends a signal of choice
        return
    import fcntl  # no module of every system

    fcntl.fcntl(reading, fcntl.F_SETOWN, -group)
    fcntl.fcntl(reading, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(reading, fcntl.F_SETFL, fcntl.fcntl(reading, fcntl.F_GETFL) | os.O_ASYNC)


def run_worker(*arguments: str, seconds: float | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    """`start_worker` with its output captured, until it ends.

    Raises:
        subprocess.TimeoutExpired: it did not end in so many seconds, and was killed.
    """
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    with start_worker(*arguments, **streams) as process:
        try:
            out, errors = process.communicate(timeout=seconds)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def same_path() -> dict[str, str]:
    """An environment in which a worker finds modules where this process does."""
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
