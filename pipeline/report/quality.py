"""How good a result is: in onnxruntime beside the float model, and in every engine beside onnxruntime."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import ConfigDict, Discriminator, Field, Tag

from lowbit.pipeline.report.engine_quality import EngineOnOutputs, EngineOnText, EngineQuality, NotCompared
from lowbit.pipeline.report.facts import Facts, optional
from lowbit.pipeline.report.output_quality import OutputQuality
from lowbit.pipeline.report.text_quality import TextQuality


def _kind(figures: Any) -> str:
    if not isinstance(figures, dict):
        return type(figures).__name__
    return "OutputQuality" if "outputs" in figures else "TextQuality"


ModelQuality = Annotated[
    Annotated[TextQuality, Tag("TextQuality")] | Annotated[OutputQuality, Tag("OutputQuality")], Discriminator(_kind)
]
"""Figures of a model that writes text, or of any other."""

KINDS = frozenset(kind.__name__ for kind in (TextQuality, OutputQuality, EngineOnText, EngineOnOutputs, NotCompared))
"""What stands in the place of an error within figures of one of these kinds, and not in the file."""


class Quality(Facts):
    """All figures of a result. Those of each engine stand beside onnxruntime's, by the name of its folder."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, EngineQuality] = Field(init=False)

    onnxruntime: ModelQuality | None = optional()
    """The quantized ONNX model beside the float model; None if the recipe has no section `validate`."""
    plain_rtn: TextQuality | None = optional()
    """What the same bits and blocks are worth with codes by plain rounding, where that was measured."""

    def with_figures(self, **figures: TextQuality | OutputQuality | EngineQuality) -> Quality:
        """The same with more figures, by their names: `onnxruntime`, `plain_rtn`, or an engine's folder."""
        return Quality(**dict(self) | figures)

    @property
    def engines(self) -> dict[str, EngineQuality]:
        """Figures of each engine, by the name of its folder."""
        return self.__pydantic_extra__

    @property
    def text(self) -> TextQuality | None:
        """Figures of a model that writes text; None for others, and where none were measured."""
        return self.onnxruntime if isinstance(self.onnxruntime, TextQuality) else None

    @property
    def outputs(self) -> OutputQuality | None:
        """Figures of a model that writes no text; None for others, and where none were measured."""
        return self.onnxruntime if isinstance(self.onnxruntime, OutputQuality) else None

    @property
    def kl_divergence(self) -> float | None:
        """Mean KL divergence from the float model, nats per token; None where it was not measured."""
        return None if self.text is None else self.text.kl_divergence

    @property
    def perplexity(self) -> float | None:
        """Perplexity on the text of `validate`; None where it was not measured."""
        return None if self.text is None else self.text.perplexity

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity over that of the float model; None where it was not measured."""
        return None if self.text is None else self.text.perplexity_ratio

    @property
    def relative_error(self) -> float | None:
        """The largest relative error of an output, for models that write no text; None where it was not measured."""
        return None if self.outputs is None else self.outputs.relative_error
