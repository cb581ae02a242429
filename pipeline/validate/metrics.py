"""How far one model's logits are from another's, token by token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lowbit.pipeline.report.text_quality import TextScores

POSITIONS = 16
"""Stretches of a window that the KL divergence is averaged over."""


ROWS = 4
"""Tokens that are scored at a time: their logits stay in the cache."""


def score_tokens(
    reference: npt.NDArray[np.float32], candidate: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    """Per token: negative log-likelihoods, KL divergence, whether the first choices agree, and which they are.

    Exponentials are float32, sums float64: likelihoods and divergences are within 1e-6 of those in float64 throughout.

    Args:
        reference, candidate: float32 logits [tokens, vocabulary].
        targets: int64 [tokens], the token that came next.

    Returns:
        float64 [tokens, 6]: nll of the reference, nll of the candidate, KL in nats, 1 or 0, the first choice of either.
    """
    parts = [slice(start, start + ROWS) for start in range(0, len(targets), ROWS)]
    return np.concatenate([_scores(reference[part], candidate[part], targets[part]) for part in parts])


def _scores(
    reference: npt.NDArray[np.float32], candidate: npt.NDArray[np.float32], targets: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    rows = np.arange(len(targets))
    best, best_candidate = reference.argmax(1), candidate.argmax(1)
    top, top_candidate = reference[rows, best], candidate[rows, best_candidate]
    shares, scratch = np.exp(reference - top[:, None]), np.exp(candidate - top_candidate[:, None])
    total, total_candidate = shares.sum(1, dtype=np.float64), scratch.sum(1, dtype=np.float64)
    log_total, log_total_candidate = np.log(total) + top, np.log(total_candidate) + top_candidate
    weighted = np.multiply(np.subtract(reference, candidate, out=scratch), shares, out=scratch).sum(1, dtype=np.float64)
    divergence = np.maximum(weighted / total - (log_total - log_total_candidate), 0)  # never below 0 but by rounding
    losses = log_total - reference[rows, targets], log_total_candidate - candidate[rows, targets]
    return np.stack([*losses, divergence, best == best_candidate, best, best_candidate], 1)


def summarize(scores: npt.NDArray[np.float64]) -> TextScores:
    """The figures of `score_tokens` results, float64 [windows, tokens - 1, 6]."""
    mean = scores.reshape(-1, scores.shape[-1]).mean(0)
    by_window = scores[..., 2].mean(1)
    worst = int(by_window.argmax())
    return TextScores(
        perplexity=float(np.exp(mean[1])),
        reference_perplexity=float(np.exp(mean[0])),
        kl_divergence=float(mean[2]),
        top1_agreement=float(mean[3]),
        tokens=scores.shape[0] * scores.shape[1],
        window=scores.shape[1] + 1,
        worst_window=worst,
        worst_window_kl=float(by_window[worst]),
        kl_by_position=tuple(float(part.mean()) for part in np.array_split(scores[..., 2].mean(0), POSITIONS) if part.size),
    )


def relative_error(candidate: npt.NDArray[np.floating], expected: npt.NDArray[np.floating]) -> float:
    """|candidate - expected| / |expected| in the Euclidean norm over all elements; 0 where both are nothing but zeros."""
    size = max(float(np.linalg.norm(expected)), float(np.finfo(np.float32).tiny))
    return float(np.linalg.norm(candidate - expected)) / size
