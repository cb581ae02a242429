"""The float model writes its own calibration text: what it says when it is used is what its layers should be good at.

Calibrating on a reasoning model's own reasoning instead of on general text was worth 9.8 points at 3 bits (Liu et al.,
arXiv:2504.04823).
"""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import numpy as np

from lowbit.passes.quant.parallel import in_order
from lowbit.pipeline.checkpoint.config import transformers_config
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.tokenizer import load_tokenizer
from lowbit.pipeline.errors import PipelineError

TOGETHER = 32
"""Texts that are written at once, each batch on one core: so the text does not depend on how many there are."""


def generate(checkpoint: Checkpoint, prompts: list[str], windows: int, window: int, seed: int) -> np.ndarray:
    """Sample at temperature 1 from the float model, in torch; int64 [windows, window].

    Each text is a prompt (in the checkpoint's chat template, if it has one) and what follows, to the end or until it has
    `window` tokens. Prompts are taken in turn, as often as needed; texts are joined and cut into windows.
    """
    import torch

    model, begins = _load(checkpoint), _begins(checkpoint, prompts, window)
    ends = _end_tokens(checkpoint)
    turns = itertools.count(0, TOGETHER)
    batches = ((start, [begins[(start + i) % len(begins)] for i in range(TOGETHER)]) for start in turns)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        written: list[int] = []
        for texts in in_order(lambda batch: _write(model, batch[1], ends, window, seed + batch[0]), batches):
            written += itertools.chain.from_iterable(texts)
            if len(written) >= windows * window:
                return np.array(written[: windows * window], np.int64).reshape(windows, window)
    finally:
        torch.set_num_threads(threads)
    raise AssertionError("batches never end")


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
    template = checkpoint.read_json("tokenizer_config.json").get("chat_template")
    if template or (checkpoint.folder / "chat_template.jinja").exists():
        from transformers import AutoTokenizer

        chat = AutoTokenizer.from_pretrained(checkpoint.folder)
        ids = [
            chat.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True)
            for text in prompts
        ]
    else:
        tokenizer = load_tokenizer(checkpoint)
        ids = [tokenizer.encode(text).ids for text in prompts]
    first = checkpoint.config.get("bos_token_id") or checkpoint.config.get("eos_token_id") or 0
    ids = [list(one)[: window // 2] or [first if isinstance(first, int) else first[0]] for one in ids]
    if not ids:
        raise PipelineError("calibrate: there is no prompt to begin with.")
    return ids


def _end_tokens(checkpoint: Checkpoint) -> set[int]:
    found = checkpoint.read_json("generation_config.json").get("eos_token_id", checkpoint.config.get("eos_token_id"))
    return {found} if isinstance(found, int) else set(found or ())


def _write(model: Any, begins: list[list[int]], ends: set[int], window: int, seed: int) -> list[list[int]]:
    """One batch of texts, the prompts padded on the left."""
    import torch

    rng = np.random.default_rng(seed)
    longest = max(map(len, begins))
    texts = [list(one) for one in begins]
    open_rows = [True] * len(begins)
    with torch.inference_mode():
        step = torch.tensor([[0] * (longest - len(one)) + one for one in begins])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in begins])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = None
        for _ in range(window):
            fed = {"input_ids": step, "attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            found = model(**fed, use_cache=True, logits_to_keep=1)
            cache = found.past_key_values
            tokens = _sample(found.logits[:, -1].float().numpy(), rng)
            for row, token in enumerate(tokens.tolist()):
                if open_rows[row]:
                    texts[row].append(token)
                    open_rows[row] = token not in ends and len(texts[row]) < window
            if not any(open_rows):
                break
            step = torch.from_numpy(tokens[:, None])
            mask = torch.cat([mask, torch.ones((len(texts), 1), dtype=mask.dtype)], -1)
            positions = positions[:, -1:] + 1
    return texts


def _sample(logits: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One token for each row of logits [rows, vocabulary], by the Gumbel trick; int64 [rows]."""
    return np.asarray((logits + rng.gumbel(size=logits.shape)).argmax(-1), np.int64)
