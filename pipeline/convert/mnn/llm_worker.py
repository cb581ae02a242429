"""Within a process of its own: an LLM folder in MNN's runtime (see measured.py)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from lowbit.pipeline.convert.engine_process import answer


def _main(request_file: str, result_file: str) -> None:
    import MNN.llm as llm  # the package; `from MNN import llm` is the bare extension

    asked = json.loads(Path(request_file).read_text())
    model = llm.create(str(Path(asked["folder"]) / "config.json"))
    # all_logits only to measure: shipped true, it would break sampling
    settings = {"memory": asked["memory"], "precision": "high", "all_logits": True, "sampler_type": "greedy"}
    model.set_config({**settings, "use_template": False})
    model.load()

    def forward(ids: list[int], fresh: bool) -> np.ndarray:
        if fresh:
            model.reset()
        output = model.forward(ids)
        return np.array(output.read(), np.float32).reshape(-1, output.shape[-1])

    def render(conversation: list[dict[str, str]]) -> str:
        model.set_config({"use_template": True})
        return str(model.apply_chat_template(conversation))

    answer(asked["request"], result_file, forward, model.tokenizer_encode, render)


if __name__ == "__main__":
    _main(*sys.argv[1:])
