"""stdout, whose troubles are told from those of files: a disk that is full under it, a reader that went away."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any


class OutputError(BaseException):
    """Nothing more can be printed, which nobody on the way can mend."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(f"what was printed could not be written: {cause.strerror}.")
        self.quiet = cause.errno == errno.EPIPE
        """Whether nobody wanted more, as in `lowbit plan x | head -1`."""


class _Raw(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # Python writes what is left when it ends
            raise OutputError(error) from None


def tell_output_errors() -> None:
    """Let whatever writes to stdout raise an OutputError where it cannot."""
    now = sys.stdout
    if now is not sys.__stdout__ or not isinstance(now, io.TextIOWrapper):  # none, or one that a test looks at
        return
    now.flush()
    raw = io.BufferedWriter(_Raw(now.fileno(), "w", closefd=False))
    sys.stdout = io.TextIOWrapper(
        raw, now.encoding, now.errors, line_buffering=now.line_buffering, write_through=now.write_through
    )
