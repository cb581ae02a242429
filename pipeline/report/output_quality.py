"""How far the outputs of a model are from those of its reference: the figures of `validate` for models that write no text."""

from __future__ import annotations

from lowbit.pipeline.report.facts import Facts, optional


class OutputError(Facts):
    """How far one output is off."""

    relative_error: float
    """|found - expected| / |expected| in the Euclidean norm, over all samples."""
    least_cosine: float
    """The least cosine similarity of one sample."""


OutputErrors = dict[str, OutputError]
"""Errors by the output's name."""


class OutputsAsRun(Facts):
    """Errors in the arithmetic that the model file asks for."""

    accuracy_levels: tuple[int, ...]
    """onnxruntime's accuracy_level of its products, but for 0."""
    outputs: OutputErrors


class OutputQuality(Facts):
    """Errors in exact arithmetic (accuracy_level 0)."""

    samples: int
    """How many inputs were run."""
    outputs: OutputErrors
    as_run: OutputsAsRun | None = optional()
    """None where the model runs in exact arithmetic."""

    @property
    def relative_error(self) -> float | None:
        """The largest relative error of an output; None if there is none."""
        return max((error.relative_error for error in self.outputs.values()), default=None)
