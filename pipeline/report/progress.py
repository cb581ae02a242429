"""What a run says of itself: one record a step, shown live and kept in the manifest."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@dataclass
class Record:
    """One step of a run, as the manifest has it."""

    name: str
    options: dict[str, Any]
    key: str = ""
    cached: bool = False
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    rewritten: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Steps:
    """Collects the records of a run and shows each as a line with its progress."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.records: list[Record] = []

    @contextmanager
    def step(self, name: str, options: dict[str, Any]) -> Iterator[tuple[Record, Callable[[float, str], None]]]:
        """A step: yields its record, to be filled, and a function to report (share done, rate)."""
        record = Record(name, options)
        columns = (SpinnerColumn(), TextColumn("{task.description:<18}"), BarColumn(24), TextColumn("{task.fields[rate]}"))
        start = time.monotonic()
        _reset_peak()
        children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        with Progress(
            *columns, TimeElapsedColumn(), console=self.console, transient=True, disable=not self.console.is_terminal
        ) as bar:
            task = bar.add_task(name, total=1.0, rate="")

            def report(done: float, rate: str = "") -> None:
                bar.update(task, completed=done, rate=rate)

            yield record, report
        record.seconds = round(time.monotonic() - start, 3)
        after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        record.peak_rss_bytes = max(_peak(), after * 1024 if after > children else 0)
        self.records.append(record)
        self.console.print(_line(record), highlight=False)


def _line(record: Record) -> str:
    what = "recalled" if record.cached else "done"
    count = f"{len(record.rewritten)} rewritten" if record.rewritten else ""
    skipped = f", {len(record.skipped)} left alone" if record.skipped else ""
    notes = "".join(f"\n    {note}" for note in record.notes)
    return (
        f"  {record.name:<18} {what:<9} {record.seconds:7.1f} s {record.peak_rss_bytes / 1e6:7.0f} MB  {count}{skipped}{notes}"
    )


def _reset_peak() -> None:
    """Let the kernel count the peak of resident memory anew (proc(5), clear_refs); Linux only."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
    """Peak resident memory since `_reset_peak`, bytes; of the process's whole life where that is unknown."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
