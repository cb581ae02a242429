"""Whole hand-offs on tiny random models: both runtimes compute the same, whatever the shapes and dtypes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit.passes import methods
from lowbit.passes.base import PassError
from lowbit.passes.registry import find_method, names_in
from lowbit.pipeline.errors import ConvertError
from tests.tiny import LLAMA3

NARROW = "narrow_embedding"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "4 bits symmetric": ((NARROW, "quantize_matmul: {bits: 4, block_size: 32, symmetric: true}"), {}),
    "3 bits symmetric": ((NARROW, "quantize_matmul: {bits: 3, block_size: 32, symmetric: true}"), {}),
    "2 bits symmetric mse": ((NARROW, "quantize_matmul: {bits: 2, block_size: 32, symmetric: true, method: mse}"), {}),
    "2 bits hqq": ((NARROW, "quantize_matmul: {bits: 2, block_size: 16, method: hqq}"), {}),
    "2 bits, float zero points": ((NARROW, "quantize_matmul: {bits: 2, block_size: 32, method: mse, zero_point: float}"), {}),
    "3 and 4 bits, float zero points, ragged": (
        (
            NARROW,
            "quantize_matmul: {bits: 4, block_size: 32, zero_point: float, include: [lm_head]}",
            "quantize_matmul: {bits: 3, block_size: 64, zero_point: float, method: hqq}",
        ),
        {"kind": "llama", "intermediate_size": 172, "attention_bias": True},
    ),
    "8 bits": ((NARROW, "quantize_matmul: {bits: 8, block_size: 64}"), {}),
    "mixed": (
        (
            NARROW,
            "quantize_matmul: {bits: 2, block_size: 32, include: ['*.down_proj']}",
            "quantize_matmul: {bits: 8, block_size: 16, include: [lm_head]}",
            "quantize_matmul: {bits: 3, block_size: 64}",
        ),
        {},
    ),
    "ragged, tied, biased llama": (
        (NARROW, "quantize_matmul: {bits: 3, block_size: 64}"),
        {"kind": "llama", "intermediate_size": 172, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "ragged hidden size": (
        (NARROW, "quantize_matmul: {bits: 4, block_size: 32}"),
        {"kind": "llama", "hidden_size": 52, "head_dim": 16},
    ),
    "float32 checkpoint": (
        ("narrow_embedding: {dtype: fp16}", "quantize_matmul: {bits: 4, block_size: 32}"),
        {"kind": "llama", "dtype": "float32"},
    ),
    "float16 shards": (
        (NARROW, "quantize_matmul: {bits: 4, block_size: 32}"),
        {"kind": "llama", "dtype": "float16", "shards": True},
    ),
    "llama 3 rope": (
        (NARROW, "quantize_matmul: {bits: 4, block_size: 32}"),
        {"kind": "llama", "head_dim": 24, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
    ),
    "mistral, yarn": (
        (NARROW, "quantize_matmul: {bits: 4, block_size: 32}"),
        {
            "kind": "mistral",
            "head_dim": 16,
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        },
    ),
    "norms of queries and keys": (
        (NARROW, "quantize_matmul: {bits: 3, block_size: 32, zero_point: float}"),
        {"kind": "qwen3", "head_dim": 32, "tie_word_embeddings": True},
    ),
    "8-bit embedding": (("quantize_embedding: {bits: 8, block_size: 32}", "quantize_matmul: {bits: 4, block_size: 32}"), {}),
    "tied 4-bit embedding": (
        ("quantize_matmul: {bits: 4, block_size: 32}", "quantize_embedding: {bits: 4, block_size: 32}"),
        {"kind": "llama", "tie_word_embeddings": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_both_runtimes_compute_the_same(results: Callable[..., Path], case: str) -> None:
    passes, model = CASES[case]
    manifest = json.loads((results(*passes, **model) / "manifest.json").read_text())
    assert manifest["hand_offs"]["mnn"]["bit_exact"] is True
    assert manifest["hand_offs"]["mnn"]["max_relative_error"] < 1e-4
    assert manifest["hand_offs"]["mnn"]["lowering_relative_error"] < 1e-5
    high = manifest["quality"]["mnn"]["memory_high"]
    assert high["greedy_equal"] == 32
    assert high["cache_relative_error"] < 1e-4
    assert high["perplexity"] == pytest.approx(manifest["quality"]["mnn"]["onnxruntime_perplexity"], rel=5e-5)
    # every text but the one with control characters in front of letters, which MNN's regular expressions read in their own way
    tokens = manifest["quality"]["mnn"]["tokenizer"]
    assert tokens["equal"] >= tokens["texts"] - 1
    assert tokens["example"] is None or tokens["example"].startswith("control")
    # int8 activations: wrong blocks would be off by factors, not by percents
    assert manifest["quality"]["mnn"]["memory_low"]["relative_error"] < 0.2


@pytest.mark.parametrize("zero_point", ["integer", "float"])
@pytest.mark.parametrize("method", [name for name in names_in(methods) if find_method(name).calibrated])
def test_what_calibrated_methods_choose_is_the_same_in_both_runtimes(
    results: Callable[..., Path], text: Path, method: str, zero_point: str
) -> None:
    quantize = f"quantize_matmul: {{bits: 3, block_size: 32, method: {method}, zero_point: {zero_point}}}"
    folder = results(
        NARROW, quantize, "fold_channel_scales", convert=f"calibrate: {{windows: 4, window: 32, text: {text}}}\nconvert: {{}}"
    )
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {(one["method"], one["zero_point"]) for one in manifest["weights"].values()} == {(method, zero_point)}
    assert manifest["hand_offs"]["mnn"]["bit_exact"] is True
    assert manifest["hand_offs"]["mnn"]["max_relative_error"] < 1e-4
    assert manifest["quality"]["mnn"]["memory_high"]["greedy_equal"] == 32


@pytest.mark.parametrize("zero_point", ["integer", "float"])
def test_scales_in_fp32(results: Callable[..., Path], zero_point: str) -> None:
    quantize = f"quantize_matmul: {{bits: 3, block_size: 32, scale_dtype: fp32, zero_point: {zero_point}}}"
    folder = results(NARROW, quantize, convert="convert: {scale_dtype: fp32}")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["hand_offs"]["mnn"]["options"]["scale_dtype"], manifest["hand_offs"]["mnn"]["bit_exact"]) == ("fp32", True)


def test_a_tied_table_quantized_alike_is_stored_once(results: Callable[..., Path]) -> None:
    passes, model = CASES["tied 4-bit embedding"]
    once = results(*passes, **model) / "onnx" / "model.onnx.data"
    twice = results(passes[0], "quantize_embedding: {bits: 4, block_size: 16}", **model) / "onnx" / "model.onnx.data"
    assert twice.stat().st_size > once.stat().st_size + 320 * 64 // 2


@pytest.mark.parametrize(
    ("passes", "model", "error", "message"),
    [
        (
            (NARROW, "quantize_matmul: {bits: 4, block_size: 32, exclude: [lm_head]}"),
            {},
            PassError,
            "the float weight 'lm_head'",
        ),
        (
            (NARROW, "quantize_matmul: {bits: 4, block_size: 32}"),
            {"kind": "llama", "dtype": "float32"},
            ConvertError,
            "narrow_embedding: {dtype: fp16}",
        ),
    ],
    ids=["float layer", "float32 embedding"],
)
def test_what_mnn_cannot_hold_is_refused(
    results: Callable[..., Path], passes: tuple[str, ...], model: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        results(*passes, **model)


@pytest.mark.parametrize(("compare", "tokens"), [("quick", 8), ("none", 0)])
def test_less_can_be_compared(results: Callable[..., Path], compare: str, tokens: int) -> None:
    """The same folder as ever, run on less: what a result holds does not depend on it."""
    passes = (NARROW, "quantize_matmul: {bits: 3, block_size: 32}")
    full, less = (results(*passes, convert=f"convert: {{compare: {how}}}") for how in ("full", compare))
    manifest = json.loads((less / "manifest.json").read_text("utf-8"))
    assert manifest["hand_offs"]["mnn"]["options"]["compare"] == compare
    figures = manifest["quality"]["mnn"]
    assert figures.get("memory_high", {}).get("greedy_equal", 0) == tokens
    assert ("compare: none" in figures.get("skipped", "")) is (tokens == 0)
    assert (less / "mnn" / "llm.mnn.weight").read_bytes() == (full / "mnn" / "llm.mnn.weight").read_bytes()


def test_plain_rounding_can_be_left_out(results: Callable[..., Path]) -> None:
    passes = (NARROW, "quantize_matmul: {bits: 3, block_size: 32, method: mse}")
    folder = results(*passes, validate="validate: {windows: 1, window: 64, plain_rtn: false}")
    assert "plain_rtn" not in json.loads((folder / "manifest.json").read_text("utf-8"))["quality"]
