"""The most memory that a step took: that of this process, or of a child that ended meanwhile."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import psutil


class PeakMemory:
    """Counts from when it is made."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):  # Linux alone counts anew (proc(5), clear_refs)
            Path("/proc/self/clear_refs").write_text("5")
        self._children = _maximum("RUSAGE_CHILDREN")

    def peak(self) -> int:
        """Resident bytes."""
        children = _maximum("RUSAGE_CHILDREN")
        return max(_own(), children if children > self._children else 0)


def _own() -> int:
    try:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return _maximum("RUSAGE_SELF") or psutil.Process().memory_info().rss


def _maximum(who: str) -> int:
    """The largest that one of these processes ever was, bytes; 0 where the system does not count it."""
    try:
        import resource  # no module of every system
    except ImportError:
        return 0
    largest = resource.getrusage(getattr(resource, who)).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
