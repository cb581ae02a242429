"""Where two models differ most: the text, and the tokens that one would have written and the other would not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from lowbit.pipeline.report.text_quality import Flip, WorstWindow

WINDOWS, FLIPS, BEFORE = 3, 5, 24
"""How many windows, how many tokens of each, and how many tokens of text before each of them."""


def worst_windows(
    scores: npt.NDArray[np.float64], windows: npt.NDArray[np.int64], tokenizer: Tokenizer
) -> tuple[WorstWindow, ...]:
    """The windows of largest mean KL divergence, each with the flipped tokens of largest KL.

    Args:
        scores: of `score_tokens`, float64 [windows, tokens - 1, 6].
        windows: token ids int64 [windows, tokens].
    """
    by_window = scores[..., 2].mean(1)
    return tuple(
        WorstWindow(window=int(i), kl_divergence=float(by_window[i]), flips=_flips(scores[i], windows[i], tokenizer))
        for i in np.argsort(-by_window, kind="stable")[:WINDOWS]
    )


def _flips(scores: npt.NDArray[np.float64], ids: npt.NDArray[np.int64], tokenizer: Tokenizer) -> tuple[Flip, ...]:
    flipped = np.flatnonzero(scores[:, 3] == 0)
    worst = flipped[np.argsort(-scores[flipped, 2], kind="stable")][:FLIPS]

    def text(*tokens: float) -> str:
        return tokenizer.decode([int(token) for token in tokens], skip_special_tokens=False)

    return tuple(
        Flip(
            position=int(t) + 1, kl_divergence=float(scores[t, 2]), before=text(*ids[max(0, t + 1 - BEFORE) : t + 1]),
            next=text(ids[t + 1]), reference=text(scores[t, 4]), candidate=text(scores[t, 5]),
        )
        for t in sorted(worst)
    )  # fmt: skip
