"""How far an engine is from onnxruntime on the same codes, in each of its ways to compute."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, Tag

from lowbit.pipeline.report.facts import Facts
from lowbit.pipeline.report.output_quality import OutputErrors


class TokenizerMatch(Facts):
    """An engine's tokenizer beside the checkpoint's."""

    texts: int
    equal: int
    """How many texts got the same token ids."""
    example: str | None
    """The first text that did not."""


class TemplateMatch(Facts):
    """An engine's chat template beside transformers'."""

    conversations: int
    equal: int
    """How many conversations became the same text."""
    example: str | None
    """The first that did not: what either made of it."""


class TextMode(Facts):
    """A way to compute, on text."""

    relative_error: float
    """Of the logits of one prefill."""
    cache_relative_error: float
    """Of logits decoded token by token, beside those of the prefill."""
    perplexity: float
    greedy_equal: int
    """How many tokens of a greedy continuation are onnxruntime's: the least of all prompts."""
    continuations: tuple[str, ...]
    """What the engine writes after each prompt, the likeliest token each time."""


class OutputMode(Facts):
    """A way to compute, on given inputs."""

    relative_error: float
    """The largest of an output."""
    outputs: OutputErrors


class EngineOnText(Facts):
    """An engine that was run on text. Its ways to compute stand beside the other figures, by their names."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, TextMode] = Field(init=False)

    onnxruntime_perplexity: float
    """In float arithmetic, on the same tokens."""
    tokens: int
    """How many predictions the perplexities are of."""
    tokenizer: TokenizerMatch
    chat_template: TemplateMatch | None
    """None if the checkpoint has no template."""

    @property
    def modes(self) -> dict[str, TextMode]:
        """Figures of each way to compute, by its name."""
        return self.__pydantic_extra__


class EngineOnOutputs(Facts):
    """An engine that was run on given inputs. Its ways to compute stand beside the other figures, by their names."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, OutputMode] = Field(init=False)

    samples: int
    """How many inputs were run."""

    @property
    def modes(self) -> dict[str, OutputMode]:
        """Figures of each way to compute, by its name."""
        return self.__pydantic_extra__


class NotCompared(Facts):
    """An engine that was not run."""

    skipped: str
    """Why not."""


Compared = EngineOnText | EngineOnOutputs


def _kind(figures: Any) -> str:
    if not isinstance(figures, dict):
        return type(figures).__name__
    return "NotCompared" if "skipped" in figures else "EngineOnText" if "tokenizer" in figures else "EngineOnOutputs"


EngineQuality = Annotated[
    Annotated[EngineOnText, Tag("EngineOnText")]
    | Annotated[EngineOnOutputs, Tag("EngineOnOutputs")]
    | Annotated[NotCompared, Tag("NotCompared")],
    Discriminator(_kind),
]
"""Whichever of the three it is."""
