"""What a run says of itself: one record a step, shown live and kept in the manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pydantic import ConfigDict, JsonValue
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from lowbit.pipeline.report.peak_memory import PeakMemory
from lowbit.pipeline.report.plain_text import plain
from lowbit.pipeline.report.records import StepRecord

log = logging.getLogger(__name__)


class Record(StepRecord):
    """The record of a step under way, to be filled."""

    model_config = ConfigDict(frozen=False)


class Steps:
    """Collects the records of a run and shows each as a line with its progress."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.records: list[Record] = []

    @contextmanager
    def step(self, name: str, options: dict[str, JsonValue]) -> Iterator[tuple[Record, Callable[[float, str], None]]]:
        """A step: yields its record, to be filled, and a function to report (share done, rate)."""
        record = Record(name=name, options=options)
        step, rate = TextColumn("{task.description:<18}", markup=False), TextColumn("{task.fields[rate]}", markup=False)
        columns = (SpinnerColumn(), step, BarColumn(24), rate)
        start = time.monotonic()
        memory = PeakMemory()
        log.info("%s: begins, options %s", name, options)
        with Progress(
            *columns, TimeElapsedColumn(), console=self.console, transient=True, disable=not self.console.is_terminal
        ) as bar:
            task = bar.add_task(name, total=1.0, rate="")

            def report(done: float, rate: str = "") -> None:
                bar.update(task, completed=done, rate=rate)

            yield record, report
        record.seconds = round(time.monotonic() - start, 3)
        record.peak_rss_bytes = memory.peak()
        self.records.append(record)
        log.info("%s", _line(record).strip())
        self.console.print(plain(_line(record)))


def _line(record: Record) -> str:
    what = "recalled" if record.cached else "done"
    count = f"{len(record.rewritten)} rewritten" if record.rewritten else ""
    skipped = f", {len(record.skipped)} left alone" if record.skipped else ""
    notes = "".join(f"\n    {note}" for note in record.notes)
    return (
        f"  {record.name:<18} {what:<9} {record.seconds:7.1f} s {record.peak_rss_bytes / 1e6:7.0f} MB  {count}{skipped}{notes}"
    )
