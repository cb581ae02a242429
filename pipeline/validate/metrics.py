"""How far one model's logits are from another's, token by token."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from lowbit.pipeline.report.text_quality import TextScores

POSITIONS = 16
"""Stretches of a window that the KL divergence is averaged over."""


@numba.njit(cache=True, nogil=True)
def score_tokens(reference, candidate, targets):  # type: ignore[no-untyped-def]
    """Per token: negative log-likelihoods, KL divergence, whether the first choices agree, and which they are.

    Args:
        reference, candidate: float32 logits [tokens, vocabulary].
        targets: int64 [tokens], the token that came next.

    Returns:
        float64 [tokens, 6]: nll of the reference, nll of the candidate, KL in nats, 1 or 0, the first choice of either.
    """
    tokens, vocabulary = reference.shape
    scores = np.empty((tokens, 6), np.float64)
    for t in range(tokens):
        best, best_candidate = 0, 0
        for v in range(vocabulary):
            if reference[t, v] > reference[t, best]:
                best = v
            if candidate[t, v] > candidate[t, best_candidate]:
                best_candidate = v
        top = np.float64(reference[t, best])
        top_candidate = np.float64(candidate[t, best_candidate])
        total, total_candidate = 0.0, 0.0
        for v in range(vocabulary):
            total += np.exp(np.float64(reference[t, v]) - top)
            total_candidate += np.exp(np.float64(candidate[t, v]) - top_candidate)
        log_total = np.log(total) + top
        log_total_candidate = np.log(total_candidate) + top_candidate
        divergence = 0.0
        for v in range(vocabulary):
            log_p = np.float64(reference[t, v]) - log_total
            log_q = np.float64(candidate[t, v]) - log_total_candidate
            divergence += np.exp(log_p) * (log_p - log_q)
        scores[t, 0] = log_total - np.float64(reference[t, targets[t]])
        scores[t, 1] = log_total_candidate - np.float64(candidate[t, targets[t]])
        scores[t, 2] = divergence
        scores[t, 3] = 1.0 if best == best_candidate else 0.0
        scores[t, 4], scores[t, 5] = best, best_candidate
    return scores


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
