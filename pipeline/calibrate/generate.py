"""Prompts -> calibration text that the float model writes: what it says when it is used is what its layers should be good at.

Calibrating on a reasoning model's own reasoning instead of on general text was worth 9.8 points at 3 bits (Liu et al.,
arXiv:2504.04823).
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.passes.quant.parallel import in_order
from lowbit.pipeline.checkpoint.chat_template import ChatRenderer, chat_template
from lowbit.pipeline.checkpoint.config import transformers_config
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import begin_id, load_tokenizer, stop_ids

TOGETHER = 32
"""Texts that are written at once, each batch on one core: so the text does not depend on how many there are."""

Texts = list[list[int]]
"""Token ids of each text of a batch."""


def written_now(number: int, write: Callable[[], Texts]) -> Texts:
    """The texts of a batch where none are kept."""
    return write()


def generate(
    checkpoint: Checkpoint, prompts: list[str], windows: int, window: int, seed: int,
    recall: Callable[[int, Callable[[], Texts]], Texts] = written_now,
) -> npt.NDArray[np.int64]:  # fmt: skip
    """Sample at temperature 1 from the float model, in torch; int64 [windows, window].

    Each text is a prompt (in the checkpoint's chat template, if it has one) and what follows, to the end or until it has
    `window` tokens. Prompts are taken in turn, as often as needed; texts are joined and cut into windows.

    Args:
        prompts: one at least.
        seed: of the first batch; the next ones count on from it.
        recall: gives the texts of a batch, by the number of its first text: those that are kept, or what the function writes.
            It is called on several threads.
    """
    import torch

    model, begins = _load(checkpoint), _begins(checkpoint, prompts, window)
    ends = set(stop_ids(checkpoint))

    def write(start: int) -> Texts:
        batch = [begins[(start + i) % len(begins)] for i in range(TOGETHER)]
        return _write(model, batch, ends, window, seed + start)

    wanted, length, texts = windows * window, float(window), 0
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ids: list[int] = []
        while len(ids) < wanted:
            # as many batches as texts of that length fill: none is written in vain, however many cores there are
            batches = math.ceil((wanted - len(ids)) / (length * TOGETHER))
            starts = range(texts, texts + batches * TOGETHER, TOGETHER)
            for batch in in_order(lambda start: recall(start, partial(write, start)), starts):
                ids += itertools.chain.from_iterable(batch)
            texts += batches * TOGETHER
            length = len(ids) / texts
    finally:
        torch.set_num_threads(threads)
    return np.array(ids[:wanted], np.int64).reshape(windows, window)


def _load(checkpoint: Checkpoint) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # in the stored dtype: the files are mapped, so a model larger than memory is only slow
        config = transformers_config(checkpoint)
        return AutoModelForCausalLM.from_pretrained(checkpoint.folder, config=config, dtype="auto").eval()


def _begins(checkpoint: Checkpoint, prompts: list[str], window: int) -> list[list[int]]:
    """Token ids of each prompt, at most half a window each."""
    tokenizer, template = load_tokenizer(checkpoint), chat_template(checkpoint)
    if template:
        renderer = ChatRenderer(checkpoint, template)
        texts = [renderer.render([{"role": "user", "content": prompt}]) for prompt in prompts]
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    else:
        ids = [tokenizer.encode(prompt).ids for prompt in prompts]
    return [begin[: window // 2] or [begin_id(checkpoint)] for begin in ids]


def _write(model: Any, begins: list[list[int]], ends: set[int], window: int, seed: int) -> Texts:
    """One batch of texts, the prompts padded on the left."""
    import torch

    rng = np.random.default_rng(seed)
    longest = max(map(len, begins))
    texts = [list(begin) for begin in begins]
    unfinished = [True] * len(begins)
    with torch.inference_mode():
        step = torch.tensor([[0] * (longest - len(begin)) + begin for begin in begins])
        mask = torch.tensor([[0] * (longest - len(begin)) + [1] * len(begin) for begin in begins])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = None
        for _ in range(window):
            feeds = {"input_ids": step, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            output = model(**feeds, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            tokens = _sample(output.logits[:, -1].float().numpy(), rng)
            for row, token in enumerate(tokens.tolist()):
                if unfinished[row]:
                    texts[row].append(token)
                    unfinished[row] = token not in ends and len(texts[row]) < window
            if not any(unfinished):
                break
            step = torch.from_numpy(tokens[:, None])
            mask = torch.cat([mask, torch.ones((len(texts), 1), dtype=mask.dtype)], -1)
            positions = positions[:, -1:] + 1
    return texts


def _sample(logits: npt.NDArray[np.float32], rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """One token for each row of logits [rows, vocabulary], by the Gumbel trick; int64 [rows]."""
    return np.asarray((logits + rng.gumbel(size=logits.shape)).argmax(-1), np.int64)
