"""The table of families in docs/families.md: what each engine takes of them, tried out on tiny checkpoints of each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lowbit.passes.base import PassError
from lowbit.passes.narrow_embedding import NarrowEmbedding
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.passes.remove_identities import RemoveIdentities
from lowbit.passes.split_projections import SplitProjections
from lowbit.pipeline.convert.registry import find_target, make_target
from lowbit.pipeline.errors import ConvertError
from lowbit.pipeline.recipe.targets import find_options
from tests.conftest import Exported
from tests.pipeline.chat_templates import TEMPLATES
from tests.pipeline.convert.mnn import test_tokenizer
from tests.tiny import LLAMA3

PAGE = Path(__file__).parents[3] / "docs" / "families.md"
HEAD = "| | export, onnxruntime | onnxruntime-genai | MNN's LLM runtime | tokenizer | chat template |"
TARGET_NAMES = ("onnxruntime-genai", "mnn-llm")


class Family(NamedTuple):
    """A family as tests/tiny.py makes it, with what its tokenizer and its chat template are like (tested there, by name)."""

    kind: str
    options: dict[str, Any]
    tokenizer: str | None
    template: str | None


FAMILIES = {
    "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen": Family("qwen2", {}, "qwen", "qwen 2.5"),
    "the same with a sliding window": Family(
        "qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, "qwen", "qwen 2.5"
    ),
    "Qwen3": Family("qwen3", {"head_dim": 32}, "qwen", "qwen 3"),
    "Qwen3-MoE": Family("qwen3_moe", {}, "qwen", "qwen 3"),
    "Llama 2, SmolLM (tied or not, biases)": Family(
        "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}, "sentence piece", "chatml"
    ),
    "Llama 3": Family("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}, "llama 3", "llama 3"),
    "Mistral": Family("mistral", {}, "sentence piece", "mistral"),
    "Mistral with a sliding window": Family("mistral", {"sliding_window": 4}, "sentence piece", "mistral"),
    "SmolLM3": Family("smollm3", {}, "llama 3", "chatml"),
    "Phi-3 (by split_projections)": Family("phi3", {}, "sentence piece", "phi 3"),
    "Gemma": Family("gemma", {}, "sentence piece", "gemma"),
    "Gemma 2": Family("gemma2", {"sliding_window": 4}, "sentence piece", "gemma"),
    "Gemma 3 (text)": Family("gemma3", {}, "sentence piece", "gemma"),
    "OLMo 2": Family("olmo2", {}, "llama 3", None),
    "Granite": Family("granite", {}, "byte level", None),
}
"""Each is compared with torch in test_export.py."""

BITS = (
    "quantize_matmul: {bits: 2, block_size: 32, include: ['*.down_proj']}",
    "quantize_matmul: {bits: 3, block_size: 32, include: ['*.o_proj', '*.up_proj']}",
    "quantize_matmul: {bits: 4, block_size: 32}",
)


def refusal(exported: Exported, family: Family, target: str) -> str:
    """Why an engine does not take a family, or nothing."""
    checkpoint, graph = exported(family.kind, **family.options)
    split = [SplitProjections()] if family.kind == "phi3" else []
    for one in (RemoveIdentities(), NarrowEmbedding(), *split, QuantizeMatmul(bits=4, block_size=32)):
        one.apply(graph)
    try:
        make_target(find_options(target)(), checkpoint).rehearse(graph)
    except (PassError, ConvertError) as error:
        return str(error).replace(f"{checkpoint.folder / 'config.json'}: ", "")
    return ""


def row_of(exported: Exported, name: str) -> str:
    """The line of the table."""
    family = FAMILIES[name]
    assert family.tokenizer is None or family.tokenizer in test_tokenizer.FAMILIES
    assert family.template is None or family.template in TEMPLATES
    reasons = [refusal(exported, family, target) for target in TARGET_NAMES]
    engines = [f"no: {reason.rstrip('.')}" if reason else "yes" for reason in reasons]
    text = [f"as `{one}`" if one else "not tried" for one in (family.tokenizer, family.template)]
    return f"| {' | '.join([name, 'yes', *engines, *text])} |"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_of_families_is_true(exported: Exported, name: str) -> None:
    row = row_of(exported, name)
    assert row in PAGE.read_text("utf-8").splitlines(), f"{PAGE.name}: {row}"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_engine_computes_the_same_at_4_3_and_2_bits(exported: Exported, results: Callable[..., Path], name: str) -> None:
    family = FAMILIES[name]
    targets = [target for target in TARGET_NAMES if not refusal(exported, family, target)]
    split = ["split_projections"] if family.kind == "phi3" else []
    convert = "convert: [" + ", ".join(f"{{target: {target}}}" for target in targets) + "]"
    folder = results(
        "remove_identities", "narrow_embedding", *split, *BITS, convert=convert, kind=family.kind, **family.options
    )
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    assert len(manifest["hand_offs"]) == len(targets) >= 1
    for engine, made in manifest["hand_offs"].items():
        figures = manifest["quality"][engine]
        exact = figures[next(iter(find_target(made["target"]).modes))]
        assert exact["relative_error"] < 1e-4
        assert exact["cache_relative_error"] < 1e-4
        assert exact["greedy_equal"] == 32


@pytest.mark.parametrize("name", [name for name, one in FAMILIES.items() if one.kind not in ("qwen2", "qwen3", "llama")])
def test_quantized_and_validated_in_onnxruntime(results: Callable[..., Path], name: str) -> None:
    """Eight bits stay close to the float model, whatever the architecture."""
    family = FAMILIES[name]
    passes = ("remove_identities", "quantize_matmul: {bits: 8, block_size: 32}")
    folder = results(*passes, convert="", kind=family.kind, **family.options)
    quality = json.loads((folder / "manifest.json").read_text("utf-8"))["quality"]["onnxruntime"]
    assert 0 < quality["kl_divergence"] < 0.02
    assert quality["top1_agreement"] > 0.9


def test_the_table_of_families_is_whole() -> None:
    lines = PAGE.read_text("utf-8").splitlines()
    start = lines.index(HEAD) + 2
    rows = lines[start : lines.index("", start)]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(FAMILIES)
