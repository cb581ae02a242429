"""What a run is made of: a step has a name, inputs, options, and a function; it is recalled or run, timed and recorded here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from lowbit.pipeline.report.progress import Record
from lowbit.pipeline.run.context import Run
from lowbit.pipeline.store.digests import digest, versions
from lowbit.pipeline.store.models import recall_model
from lowbit.pipeline.store.source_digest import Root, source_digest
from lowbit.pipeline.store.store import Entry, Store

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A step under way: its record, what it reports to, and the store that it is recalled from."""

    record: Record
    report: Callable[[float, str], None]
    store: Store

    def progress(self, done: float) -> None:
        """Report the share that is done."""
        self.report(done, "")

    def recall(self, write: Callable[[Path], dict[str, Any]]) -> Entry:
        """The result of the step: its entry in the store, or a new one that `write` fills."""
        entry = self.store.get(self.record.key)
        self.record.cached = entry is not None
        return entry or self.store.put(self.record.key, write)

    def recall_model(self, kind: TypeAdapter[T], compute: Callable[[], T]) -> T:
        """The figures that the step measures: a model from the store, or a new one."""
        figures, self.record.cached = recall_model(self.store, self.record.key, kind, compute)
        return figures

    def remember(self, content: object) -> None:
        """Let the steps that depend on this one depend on what it made: the same content, the same key."""
        self.record.key = digest(self.record.key, content)

    def recalled_each(self, made: int, whole: int, verb: str) -> None:
        """Note how many of `whole` results were made now; all the others were recalled one by one."""
        self.record.cached = made == 0
        self.record.notes.append(f"{made} {verb}, {whole - made} recalled")


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        name: what people read; steps of several targets share theirs.
        work: does it, and leaves the result with the run.
        options: what the manifest says of it.
        inputs: what it depends on, by `identity`: steps before it, or what `Run.key` knows of the model.
        depends: what else its result depends on; by default its options.
        code: the classes and functions that it runs.
        packages: the libraries that shape its result.
        identity: its own name among `inputs`, by default `name`.
    """

    name: str
    work: Callable[[Run, Task], None]
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    depends: Any = None
    code: tuple[Root, ...] = ()
    packages: tuple[str, ...] = ()
    identity: str = ""

    def key(self, run: Run) -> str:
        """SHA-256 over everything that the step depends on, in hex."""
        return digest(
            self.name, [run.key(name) for name in self.inputs], self.options if self.depends is None else self.depends,
            source_digest(*self.code), versions(self.packages),
        )  # fmt: skip


def execute(run: Run, step: Step) -> None:
    """Recall a step or run it; time and record it; note the key of what it made."""
    with run.steps.step(step.name, dict(step.options)) as (record, report):
        record.key = step.key(run)
        step.work(run, Task(record, report, run.store))
        run.keys[step.identity or step.name] = record.key
