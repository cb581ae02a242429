"""`lowbit`, or `python -m lowbit`: the command line, and how it ends.

Status 0 when all is done; 2, with a sentence, when something asked for is wrong or a gate is missed; 130 after Ctrl-C; 1,
with a traceback, when the fault is our own.
"""

from __future__ import annotations

import signal
import sys

from lowbit.passes.base import PassError
from lowbit.pipeline.cli.app import app, call
from lowbit.pipeline.errors import PipelineError, visible

__all__ = ["app", "main"]


class _Stopped(BaseException):
    """Ctrl-C, by a name that typer does not catch on the way."""


def _stop(*_: object) -> None:
    raise _Stopped


def main() -> None:
    """Run the command line; mistakes of the user end it with status 2 and a sentence."""
    signal.signal(signal.SIGINT, _stop)
    try:
        call(sys.argv[1:])
    except (PipelineError, PassError) as error:
        notes = "\n".join(getattr(error, "__notes__", ())).splitlines()
        print(visible("\n".join([f"error: {error}", *(f"  {line}" for line in notes)])), file=sys.stderr)
        sys.exit(2)
    except _Stopped:
        print("\nstopped. What was finished is kept: run again to go on.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
