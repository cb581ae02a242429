"""Run a function in a process of its own: what it imports and allocates is gone when it returns."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import ParamSpec, TypeVar

from lowbit.pipeline.errors import PipelineError

P = ParamSpec("P")
T = TypeVar("T")


def isolated(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `function`, computed in a new process; its exceptions are raised here.

    Raises:
        PipelineError: the process died, most likely for lack of memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _ignore_interrupts) as pool:
        future = pool.submit(function, *args, **kwargs)
        try:
            return future.result()
        except BrokenProcessPool as error:
            raise PipelineError(
                f"the process for {function.__name__} was killed, most likely for lack of memory; free some and run again."
            ) from error
        except BaseException:  # Ctrl-C: the child ignores it, so end it here
            if not future.done():
                for process in (pool._processes or {}).values():
                    process.kill()
            raise


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
