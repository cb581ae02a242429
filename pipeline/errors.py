"""What can go wrong through no fault of ours. Each message says what, where, and what would be right."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


def visible(text: str) -> str:
    """Text with characters that steer a terminal, or that nobody sees, written as escapes: names may hold them."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class PipelineError(Exception):
    """A mistake that the user can mend; shown without a traceback, exit status 2."""


@dataclass(frozen=True)
class Position:
    """A place in a recipe, counted from 1."""

    file: Path
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"

    @property
    def short(self) -> str:
        """Within the same file."""
        return f"line {self.line}"


@dataclass(frozen=True)
class OptionName:
    """A place in a recipe that was built in Python: keys and indices from the top."""

    path: tuple[str | int, ...]

    def __str__(self) -> str:
        return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path).removeprefix(".") or "recipe"

    @property
    def short(self) -> str:
        """The same: there is no file to leave out."""
        return str(self)


class RecipeError(PipelineError):
    """The recipe is not what its schema says; the message begins with file:line:column, or with the option's name in Python."""

    def __init__(self, position: Position | OptionName | Path, message: str) -> None:
        super().__init__(f"{position}: {message}")


class CheckpointError(PipelineError):
    """The checkpoint cannot be found, read or trusted."""


class ExportError(PipelineError):
    """The checkpoint cannot become the ONNX graph that it describes."""


class ValidationFailed(PipelineError):  # noqa: N818  (the name users see)
    """A gate of `validate:` was missed; the message carries the table."""


class ConvertError(PipelineError):
    """An engine's converter or runtime refused, or what it made is not what went in."""
