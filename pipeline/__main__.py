"""`lowbit`, or `python -m lowbit`: the command line, and how it ends.

Status 0 when all is done; 2, with a sentence, when something asked for is wrong or a gate is missed; 130 after Ctrl-C, 143
after SIGTERM; 1, with a traceback, when the fault is our own.
"""

from __future__ import annotations

import signal
import sys
import time

from lowbit.passes.base import PassError
from lowbit.pipeline.cli.app import app, call
from lowbit.pipeline.errors import PipelineError, visible

__all__ = ["app", "main"]


SIGNALS = (signal.SIGINT, signal.SIGTERM)
TWICE = 2.0
"""Seconds in which a signal that comes again is the same one: `timeout` sends it to us and to our group."""


class _Stopped(BaseException):
    """Ctrl-C or SIGTERM, by a name that typer does not catch on the way."""


def _stop_on_signals() -> None:
    last = float("-inf")

    def stop(number: int, _: object) -> None:
        nonlocal last
        before, last = last, time.monotonic()
        if last - before > TWICE:
            raise _Stopped(number)

    for number in SIGNALS:
        signal.signal(number, stop)


def main() -> None:
    """Run the command line; mistakes of the user end it with status 2 and a sentence."""
    _stop_on_signals()
    try:
        call(sys.argv[1:])
    except (PipelineError, PassError) as error:
        notes = "\n".join(getattr(error, "__notes__", ())).splitlines()
        print(visible("\n".join([f"error: {error}", *(f"  {line}" for line in notes)])), file=sys.stderr)
        sys.exit(2)
    except _Stopped as stopped:
        print("\nstopped. What was finished is kept: run again to go on.", file=sys.stderr)
        sys.exit(128 + stopped.args[0])


if __name__ == "__main__":
    main()
