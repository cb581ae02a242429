"""run.log, beside a result: what happened when, and what went wrong, for whoever was not looking."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LOG = "run.log"
"""No part of the result: `lowbit check` does not ask for it."""
FORM = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


@contextmanager
def logged(folder: Path) -> Iterator[None]:
    """Write what the package logs meanwhile to `folder`/run.log, anew, and how it ended, if by an error."""
    log = logging.getLogger("lowbit")
    before = log.level, log.propagate
    handler = logging.FileHandler(folder / LOG, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORM))
    log.propagate = log.isEnabledFor(logging.INFO)  # what the file gets is not for those who asked for warnings alone
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        yield
    except BaseException:
        log.exception("ended by an error")
        raise
    finally:
        log.removeHandler(handler)
        handler.close()
        log.setLevel(before[0])
        log.propagate = before[1]
