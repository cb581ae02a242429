"""`lowbit`, or `python -m lowbit`: the command line, and how it ends.

Status 0 when all is done; 2, with a sentence, when something asked for is wrong or a gate is missed; 130 after Ctrl-C, 143
after SIGTERM; 1 when the fault is our own, with a report in a file, or nothing more can be printed.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time

from lowbit.passes.base import PassError
from lowbit.pipeline.cli.app import app, call
from lowbit.pipeline.cli.output import OutputError, tell_output_errors
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
    """Run the command line, and end with a status and, unless all is done, a sentence."""
    _stop_on_signals()
    tell_output_errors()
    try:
        try:
            call(sys.argv[1:])
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except (PipelineError, PassError) as error:
        notes = "\n".join(getattr(error, "__notes__", ())).splitlines()
        _say("\n".join([f"error: {error}", *(f"  {line}" for line in notes)]))
        sys.exit(2)
    except _Stopped as stopped:
        _say("\nstopped. What was finished is kept: run again to go on.")
        sys.exit(128 + stopped.args[0])
    except OutputError as error:
        if not error.quiet:
            _say(f"error: {error}")
        sys.exit(1)
    except Exception as error:
        from lowbit.pipeline.cli.fault import tell_fault

        _say(f"error: {tell_fault(error, sys.argv[1:])}")
        sys.exit(1)


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # there is nowhere to say that it cannot be said
        print(visible(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
