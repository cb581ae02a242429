"""Within a process of its own: a folder of onnxruntime-genai in its runtime (see measured.py)."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from lowbit.pipeline.convert.engine_process import answer
from lowbit.pipeline.onnx_io.writer import MODEL
from lowbit.pipeline.runtime.session import load_model


def _main(request_file: str, result_file: str) -> None:
    asked = json.loads(Path(request_file).read_text())
    folder = Path(asked["folder"])
    with tempfile.TemporaryDirectory(dir=folder.parent) as other:
        if asked["accuracy_level"] is not None:
            folder = _at_level(folder, Path(other), asked["accuracy_level"])
        _answer(folder, asked["request"], result_file)


def _at_level(folder: Path, other: Path, level: int) -> Path:
    """The same folder, every quantized MatMul computed at `level`: links, but for the graph."""
    for file in folder.iterdir():
        if file.name != MODEL:
            (other / file.name).hardlink_to(file)
    (other / MODEL).write_bytes(load_model(folder / MODEL, level).SerializeToString())
    return other


def _answer(folder: Path, request: dict[str, Any], result_file: str) -> None:
    import onnxruntime_genai as genai

    model = genai.Model(str(folder))
    tokenizer = genai.Tokenizer(model)
    longest = 1 + max(
        request["new_tokens"] + max(map(len, request["prompts"])), *map(len, [request["probe"], *request["windows"]])
    )
    generators: list[Any] = []

    def forward(ids: list[int], fresh: bool) -> np.ndarray:
        if fresh:
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=longest, do_sample=False)
            generators[:] = [genai.Generator(model, parameters)]
        generators[0].append_tokens(np.array(ids, np.int32))
        return np.array(generators[0].get_output("logits"), np.float32)[0]

    def render(conversation: Any) -> str | None:
        try:
            return str(tokenizer.apply_chat_template(json.dumps(conversation), add_generation_prompt=True))
        except Exception:  # the library raises bare ones: no template, or one that refuses
            return None

    answer(request, result_file, forward, lambda text: tokenizer.encode(text).tolist(), render)


if __name__ == "__main__":
    _main(*sys.argv[1:])
