"""manifest.json: what was made, from what, how, and how good it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final, Literal, Self

from pydantic import ValidationError, model_validator

from lowbit.pipeline.checkpoint.files import parse_json
from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.report.facts import Facts
from lowbit.pipeline.report.gates import Gate
from lowbit.pipeline.report.quality import KINDS, Quality
from lowbit.pipeline.report.records import HandOff, Size, Source, StepRecord, WeightRecord
from lowbit.pipeline.store.digests import digest

MANIFEST = "manifest.json"
VERSION: Final = 1


class Manifest(Facts):
    """All of manifest.json."""

    version: Literal[1]
    """Of this form of the file."""
    recipe: str
    model: Source
    versions: dict[str, str]
    """Of the libraries that were there."""
    steps: tuple[StepRecord, ...]
    weights: dict[str, WeightRecord]
    size: Size
    quality: Quality
    hand_offs: dict[str, HandOff]
    """By the folder's name."""
    model_type: str | None
    """The architecture, as config.json names it."""
    recipe_text: str
    gates: tuple[Gate, ...]
    files: dict[str, str]
    """SHA-256 of every file, by its path within the result."""
    seal: str = ""
    """SHA-256 of all of this but `files`, which can be read again; report.html shows it, too."""

    @property
    def text(self) -> str:
        """The file, to the byte: there is one way to write it."""
        return json.dumps(self.model_dump(mode="json"), indent=1)

    @property
    def digest(self) -> str:
        """What `seal` has to be."""
        return digest(self.model_dump(mode="json", exclude={"files", "seal"}))

    @property
    def folders(self) -> list[str]:
        """The folders of the result: `onnx` and one for each engine."""
        return ["onnx", *self.hand_offs]

    @property
    def seconds(self) -> float:
        """How long all steps took."""
        return sum(step.seconds for step in self.steps)

    @property
    def missed(self) -> list[Gate]:
        """The gates that were missed."""
        return [gate for gate in self.gates if not gate.passed]

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        """One size and one set of figures for each engine, and gates that follow from the figures."""
        if set(self.quality.engines) != set(self.hand_offs):
            raise ValueError(f"quality has figures of {sorted(self.quality.engines)}, hand_offs names {sorted(self.hand_offs)}")
        if missing := [folder for folder in self.folders if not hasattr(self.size, f"{folder}_bytes")]:
            raise ValueError(f"size lacks the bytes of {', '.join(missing)}")
        for gate in self.gates:
            if gate.model_dump_json() != Gate.held(gate.name, gate.allowed, self.quality).model_dump_json():
                raise ValueError(f"the gate {gate.name} does not follow from the figures in quality")
        return self


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished folder.

    Raises:
        PipelineError: there is none, it is damaged, or another version made it.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise PipelineError(f"{folder}: no {MANIFEST}, so no run has finished here.")
    try:
        text = path.read_text("utf-8")
        content = parse_json(text)
    except ValueError as error:
        raise PipelineError(f"{path}: damaged: {error}") from error
    if not isinstance(content, dict) or not {"files", "weights", "hand_offs"} <= set(content):
        raise PipelineError(f"{path}: damaged: it is not a manifest of a finished run.")
    if (version := content.get("version", 0)) != VERSION:
        which = "a later" if isinstance(version, int) and version > VERSION else "an earlier"
        raise PipelineError(f"{path}: made by {which} version. Run the recipe again; what is known already is recalled.")
    try:
        return Manifest.model_validate_json(text)
    except ValidationError as error:
        raise PipelineError(f"{path}: damaged: {_sentence(error)} Run the recipe again.") from error


def _sentence(error: ValidationError) -> str:
    """The first thing that is wrong, with the field's place in the file."""
    first = error.errors(include_url=False)[0]
    place = ".".join(str(part) for part in first["loc"] if part not in KINDS)
    match first["type"]:
        case "value_error":
            return f"{first['ctx']['error']}."
        case "missing":
            return f"{place} is missing."
        case "extra_forbidden" | "unexpected_keyword_argument":
            return f"{place} means nothing here."
        case "union_tag_invalid":
            return f"{place} is {first['input']!r:.60}; expected an object."
    message = first["msg"].replace("Input should be", "expected")
    return f"{place} is {first['input']!r:.60}; {message[0].lower()}{message[1:]}."
