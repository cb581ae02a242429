"""What the float model, the quantized one and every engine write after the same prompts."""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.pipeline.report.engine_quality import EngineOnText
from lowbit.pipeline.report.manifest import Manifest


@dataclass(frozen=True)
class Line:
    """What one of them writes, cut where it leaves the float model's text."""

    name: str
    same: str
    other: str


@dataclass(frozen=True)
class Writing:
    """What all of them write after a prompt."""

    prompt: str
    lines: list[Line]


def writings(manifest: Manifest) -> list[Writing]:
    """One for each prompt of the validation; none where nothing was written."""
    text = manifest.quality.text
    written = []
    for number, continuation in enumerate((text and text.continuations) or ()):
        texts = {"float model": continuation.float, "onnxruntime": continuation.onnxruntime, **_by_engines(manifest, number)}
        lines = [_line(name, written_by, continuation.float) for name, written_by in texts.items()]
        written.append(Writing(continuation.prompt, lines))
    return written


def _by_engines(manifest: Manifest, number: int) -> dict[str, str]:
    """What each engine writes after a prompt, in each of its ways to compute."""
    return {
        f"{hand_off.label}, {hand_off.modes[name]}": mode.continuations[number]
        for folder, hand_off in manifest.hand_offs.items()
        if isinstance(figures := manifest.quality.engines[folder], EngineOnText)
        for name, mode in figures.modes.items()
        if number < len(mode.continuations)  # a quick comparison has one
    }


def _line(name: str, text: str, reference: str) -> Line:
    same = next((i for i, (a, b) in enumerate(zip(text, reference, strict=False)) if a != b), len(text))
    return Line(name, text[:same], text[same:])
