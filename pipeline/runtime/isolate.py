"""Run a function in a process of its own: what it imports and allocates is gone when it returns.

The process knows nothing of the program that asked: it does not import its main module again (as multiprocessing does), so
scripts need no `if __name__ == "__main__"`, and it takes no module from the folder that it happens to start in.
"""

from __future__ import annotations

import logging
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.processes import run_worker

P = ParamSpec("P")
T = TypeVar("T")
LAST_LINES = 12
log = logging.getLogger(__name__)


def isolated(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The result of `function`, computed in a new process; its exceptions are raised here, with what was printed before.

    Args:
        function: of a module that can be imported; arguments and result are pickled.

    Raises:
        PipelineError: the process died, most likely for lack of memory, or took more time than it had set itself.
    """
    with tempfile.TemporaryDirectory() as scratch:
        request, result = Path(scratch, "request"), Path(scratch, "result")
        request.write_bytes(pickle.dumps(sys.path) + pickle.dumps((function, args, kwargs)))
        process = run_worker("-m", __name__, str(request), str(result), stderr=subprocess.STDOUT)
        printed = process.stdout
        log.debug("%s printed:\n%s", function.__name__, printed)
        end = "\n".join(printed.strip().splitlines()[-LAST_LINES:])
        if process.returncode == -signal.SIGXCPU:
            raise _noted(
                PipelineError(f"the process for {function.__name__} took more processor time than it may and was stopped."), end
            )
        if process.returncode < 0:
            raise _noted(
                PipelineError(
                    f"the process for {function.__name__} was killed, most likely for lack of memory; free some and run again."
                ),
                end,
            )
        if process.returncode:
            raise _noted(RuntimeError(f"the process for {function.__name__} ended with status {process.returncode}"), end)
        failure, value = pickle.loads(result.read_bytes())
    if failure is not None:
        raise _noted(failure, end)
    found: T = value
    return found


def _noted(error: BaseException, printed: str) -> BaseException:
    if printed:
        error.add_note(f"what was printed before:\n{printed}")
    return error


def _main(request: str, result: str) -> None:
    """Within the process."""
    with open(request, "rb") as stream:  # noqa: PTH123  (two pickles, one after the other)
        sys.path[:] = pickle.load(stream)
        function, args, kwargs = pickle.load(stream)
    failure, value = None, None
    try:
        value = function(*args, **kwargs)
    except Exception as error:
        failure = error
        if not isinstance(error, PipelineError):  # a bug of ours or of a library: the traceback does not travel with it
            traceback.print_exc()
    Path(result).write_bytes(pickle.dumps((failure, value)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
