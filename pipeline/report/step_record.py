"""What a run remembers of a step."""

from __future__ import annotations

from pydantic import Field, JsonValue

from lowbit.pipeline.report.facts import Facts


class StepRecord(Facts):
    """One step of a run, as the manifest has it."""

    name: str
    options: dict[str, JsonValue]
    key: str = ""
    """SHA-256 of everything that the step depends on; empty for one that makes nothing."""
    cached: bool = False
    """Whether all that it makes was known."""
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    """Most memory that was in use at a time, by this process or one that it started."""
    rewritten: list[str] = Field(default_factory=list)
    """What a pass rewrote, by name."""
    skipped: dict[str, str] = Field(default_factory=dict)
    """What a pass left alone, with a sentence each."""
    notes: list[str] = Field(default_factory=list)
    """Remarks for people."""
