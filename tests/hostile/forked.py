"""Python processes of the program's own, as forks of one that has imported what they would: the same limits, no wait."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import traceback
import warnings
from typing import Any

WORKERS = tuple(f"lowbit.pipeline.checkpoint.{name}_worker" for name in ("onnx", "template", "tokenizer"))


class ForkedPopen(subprocess.Popen):  # type: ignore[type-arg]
    """Runs `python -P -m WORKER ...` in a fork; everything else as ever."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        if not (isinstance(args, list) and args[1:3] == ["-P", "-m"] and args[3] in WORKERS):
            super()._execute_child(args, *rest)
            return
        p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite = rest[9:15]
        self.pid = os.fork()
        if self.pid == 0:
            for ours in (p2cwrite, c2pread, errread):
                if ours >= 0:
                    os.close(ours)
            _become(args, p2cread, c2pwrite, errwrite)
        self._child_created = True
        self._close_pipe_fds(p2cread, p2cwrite, c2pread, c2pwrite, errread, errwrite)


def _become(command: list[str], *streams: int) -> None:
    """Be the process of a command: its streams, its arguments, its end."""
    os.setpgid(0, 0)  # a group of its own, as its starter asks for
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for number, stream in enumerate(streams):
        if stream >= 0:
            os.dup2(stream, number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, closefd=False) for n, mode in enumerate(("r", "w", "w")))
    sys.argv = command[3:]
    status: Any = 1
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it was imported before: that is the purpose
            runpy.run_module(command[3], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 0 if status is None else 1)


def fork_workers() -> None:
    """Start the workers as forks from now on."""
    subprocess.Popen = ForkedPopen  # type: ignore[misc]
