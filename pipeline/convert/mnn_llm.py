"""Run an MNN LLM folder in a process of its own and say what it computed.

`python -m pipeline.convert.mnn_llm REQUEST.json RESULT.npz`: MNN may crash, prints what it likes, and never
shares a process with the libraries of the rest.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import ConvertError


@dataclass(frozen=True)
class Measured:
    """What the runtime computed.

    Attributes:
        logits: float32 [tokens, vocabulary] of one prefill of the probe.
        steps: the same logits, the last `len(steps)` of them decoded token by token on the cache.
        greedy: token ids continued from `prompt`.
        losses: float64 [windows, tokens - 1], negative log-likelihood of each next token.
        ids: what the tokenizer made of each text.
        chats: what the chat template made of each conversation.
    """

    logits: np.ndarray
    steps: np.ndarray
    greedy: list[int]
    losses: np.ndarray
    ids: list[list[int]]
    chats: list[str]


def measure(
    folder: Path, memory: str, probe: list[int], prompt: list[int], new_tokens: int, windows: np.ndarray, texts: Sequence[str],
    conversations: Sequence[Any],    scratch: Path,
) -> Measured:  # fmt: skip
    """Run the folder's model, `memory` "high" (weights in float) or "low" (int8 activations, as on a phone).

    Raises:
        ConvertError: the runtime crashed or refused the folder.
    """
    request, result = scratch / f"request_{memory}.json", scratch / f"result_{memory}.npz"
    request.write_text(
        json.dumps(
            {
                "folder": str(folder), "memory": memory, "probe": probe, "prompt": prompt, "new_tokens": new_tokens,
                "windows": windows.tolist(), "texts": list(texts), "conversations": list(conversations),
            }
        )
    )  # fmt: skip
    result.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.convert.mnn_llm", str(request), str(result)],
        capture_output=True, text=True, errors="replace", check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if done.returncode or not result.exists():
        end = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
        raise ConvertError(f"MNN's runtime failed on {folder} (status {done.returncode}):\n{end}")
    with np.load(result) as found:
        written = json.loads(str(found["written"]))
        return Measured(found["logits"], found["steps"], found["greedy"].tolist(), found["losses"], **written)


def _main(request_file: str, result_file: str) -> None:
    import MNN.llm as llm  # the package; `from MNN import llm` is the bare extension

    request = json.loads(Path(request_file).read_text())
    model = llm.create(str(Path(request["folder"]) / "config.json"))
    # all_logits only to measure: shipped true, it would break sampling
    model.set_config(
        {"memory": request["memory"], "precision": "high", "all_logits": True, "sampler_type": "greedy", "use_template": False}
    )
    model.load()

    def forward(ids: list[int], fresh: bool) -> np.ndarray:
        if fresh:
            model.reset()
        output = model.forward(ids)
        return np.array(output.read(), np.float32).reshape(-1, output.shape[-1])

    probe = request["probe"]
    logits = forward(probe, True)
    half = len(probe) // 2
    forward(probe[:half], True)
    steps = [forward([token], False)[-1] for token in probe[half:]]
    scores, greedy = forward(request["prompt"], True)[-1], []
    for _ in range(request["new_tokens"]):
        greedy.append(int(scores.argmax()))
        scores = forward(greedy[-1:], False)[-1]
    losses = [token_losses(forward(ids, True), ids) for ids in request["windows"]]
    ids = [model.tokenizer_encode(text) for text in request["texts"]]
    model.set_config({"use_template": True})
    written = json.dumps({"ids": ids, "chats": [model.apply_chat_template(one) for one in request["conversations"]]})
    np.savez(
        result_file, logits=logits, steps=np.array(steps), greedy=np.array(greedy), losses=np.array(losses), written=written
    )


def token_losses(logits: np.ndarray, ids: list[int]) -> np.ndarray:
    """Negative log-likelihood of each next token, float64 [len(ids) - 1], from logits [len(ids), vocabulary]."""
    wide = logits[:-1].astype(np.float64)
    top = wide.max(1)
    total = np.log(np.exp(wide - top[:, None]).sum(1)) + top
    losses: np.ndarray = total - wide[np.arange(len(ids) - 1), ids[1:]]
    return losses


if __name__ == "__main__":
    _main(*sys.argv[1:])
