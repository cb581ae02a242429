"""How far a model that writes text is from its reference: the figures of `validate` for decoders."""

from __future__ import annotations

from lowbit.pipeline.report.facts import Facts, optional


class TextScores(Facts):
    """A candidate against its reference over the same tokens."""

    perplexity: float
    """exp of the candidate's mean negative log-likelihood of the next token."""
    reference_perplexity: float
    """The same of the reference."""
    kl_divergence: float
    """Mean KL(reference || candidate) over predicted tokens, nats per token."""
    top1_agreement: float
    """Share of tokens where both rank the same token first."""
    tokens: int
    """How many predictions were compared."""
    window: int
    """Tokens that were read at once."""
    worst_window: int
    """The window (counted from 0) of largest mean KL divergence."""
    worst_window_kl: float
    """That KL divergence, nats per token."""
    kl_by_position: tuple[float, ...]
    """Mean KL divergence over all windows in equal stretches of a window, from its first token to its last."""

    @property
    def perplexity_ratio(self) -> float:
        """The candidate's perplexity over that of the reference."""
        return self.perplexity / self.reference_perplexity


class ScoresAsRun(TextScores):
    """Scores in the arithmetic that the model file asks for."""

    accuracy_levels: tuple[int, ...]
    """onnxruntime's accuracy_level of its products, but for 0."""


class Flip(Facts):
    """A token that the reference would have written and the candidate would not."""

    position: int
    """Its place in the window, counted from 0."""
    kl_divergence: float
    """Nats."""
    before: str
    """The text before it."""
    next: str
    """What came next in the text."""
    reference: str
    candidate: str


class WorstWindow(Facts):
    """A window of large mean KL divergence, with its flipped tokens of largest KL divergence."""

    window: int
    """Counted from 0."""
    kl_divergence: float
    """Nats per token."""
    flips: tuple[Flip, ...]


class Continuation(Facts):
    """What models write after a prompt, the likeliest token each time."""

    prompt: str
    float: str
    """By the float model."""
    onnxruntime: str
    """By the quantized model, as it runs."""


class TextQuality(TextScores):
    """Scores in exact arithmetic (weights dequantized, products in float32), and where the two models differ most."""

    worst_windows: tuple[WorstWindow, ...]
    as_run: ScoresAsRun | None = optional()
    """None where the model runs in exact arithmetic, or where it was of no interest."""
    as_run_skipped: str | None = optional()
    """Why the scores of a model's own arithmetic are those of the exact one."""
    continuations: tuple[Continuation, ...] | None = optional()
    """None where the float model is too large to be held in memory."""
