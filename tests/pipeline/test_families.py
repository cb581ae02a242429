"""The README's table of families: what exports and what MNN takes, tried out on tiny checkpoints of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from passes.base import PassError
from passes.narrow_embedding import NarrowEmbedding
from passes.quantize_matmul import QuantizeMatmul
from passes.remove_identities import RemoveIdentities
from pipeline.convert.mnn_llm_folder import MnnLlm
from pipeline.errors import ConvertError
from pipeline.recipe import Convert
from tests.conftest import Exported
from tests.tiny import LLAMA3

README = Path(__file__).parents[2] / "README.md"
HEAD = "| | export, onnxruntime | MNN's LLM runtime |"
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2, Qwen2.5": ("qwen2", {}),
    "the same with a sliding window": ("qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "Qwen3": ("qwen3", {"head_dim": 32}),
    "Llama 2, SmolLM (tied or not, biases)": ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "Llama 3": ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
    "Mistral": ("mistral", {}),
    "Mistral with a sliding window": ("mistral", {"sliding_window": 4}),
    "SmolLM3": ("smollm3", {}),
    "Phi-3": ("phi3", {}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", {"sliding_window": 4}),
    "Gemma 3 (text)": ("gemma3", {}),
    "OLMo 2": ("olmo2", {}),
    "Granite": ("granite", {}),
}
"""Each is compared with torch in test_export.py, those that MNN takes run there in test_hand_off.py."""


def refusal(exported: Exported, kind: str, options: dict[str, Any]) -> str:
    """Why MNN does not take a family, or nothing."""
    checkpoint, graph = exported(kind, **options)
    for one in (RemoveIdentities(), NarrowEmbedding(), QuantizeMatmul(bits=4, block_size=32)):
        one.apply(graph)
    try:
        MnnLlm(Convert(), checkpoint).rehearse(graph)
    except (PassError, ConvertError) as error:
        return str(error).replace(f"{checkpoint.folder / 'config.json'}: ", "")
    return ""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_of_the_readme_is_true(exported: Exported, family: str) -> None:
    reason = refusal(exported, *FAMILIES[family])
    row = f"| {family} | yes | {'no: ' + reason.rstrip('.') if reason else 'yes'} |"
    assert row in README.read_text("utf-8").splitlines(), f"README, What works: {row}"


@pytest.mark.parametrize("family", [name for name, (kind, _) in FAMILIES.items() if kind not in ("qwen2", "qwen3", "llama")])
def test_quantized_and_validated_in_onnxruntime(results: Callable[..., Path], family: str) -> None:
    """Eight bits stay close to the float model, whatever the architecture."""
    kind, options = FAMILIES[family]
    folder = results("remove_identities", "quantize_matmul: {bits: 8, block_size: 32}", convert="", kind=kind, **options)
    quality = json.loads((folder / "manifest.json").read_text("utf-8"))["quality"]["onnxruntime"]
    assert 0 < quality["kl_divergence"] < 0.02
    assert quality["top1_agreement"] > 0.9


def test_the_table_of_the_readme_is_whole() -> None:
    lines = README.read_text("utf-8").splitlines()
    start = lines.index(HEAD) + 2
    rows = lines[start : lines.index("", start)]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [*FAMILIES, "BERT"]
