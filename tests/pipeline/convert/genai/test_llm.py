"""Folders for onnxruntime-genai: opened and run there, proven, and what happens where they cannot be."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from lowbit.passes.base import PassError
from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.commands.plan import make_plan
from lowbit.pipeline.convert.compare_text import TEXTS
from lowbit.pipeline.convert.genai.llm import OnnxruntimeGenai
from lowbit.pipeline.errors import ConvertError, PipelineError
from lowbit.pipeline.recipe.load import load_recipe
from lowbit.pipeline.store.store import Store
from tests.pipeline.convert.mnn.test_llm import flip
from tests.running import run_in_process
from tests.tiny import recipe_text

GENAI = "convert: {target: onnxruntime-genai}"
NARROW = "narrow_embedding"
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], str]] = {
    "mixed bits": (
        (
            NARROW,
            "quantize_matmul: {bits: 2, block_size: 32, include: ['*.down_proj']}",
            "quantize_matmul: {bits: 8, block_size: 16, include: [lm_head, '*.1.*.v_proj']}",
            "quantize_matmul: {bits: 3, block_size: 64}",
        ),
        {},
        "packed",
    ),
    "folded, symmetric": ((NARROW, "quantize_matmul: {bits: 3, block_size: 32, symmetric: true}"), {}, "folded"),
    "folded, integer zero points": ((NARROW, "quantize_matmul: {bits: 3, block_size: 32}"), {"kind": "qwen3"}, "folded"),
    "folded, float zero points, ragged, tied": (
        (NARROW, "quantize_matmul: {bits: 3, block_size: 64, zero_point: float}"),
        {"kind": "llama", "intermediate_size": 172, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        "folded",
    ),
    "8-bit embedding": (
        ("quantize_embedding: {bits: 8, block_size: 32}", "quantize_matmul: {bits: 4, block_size: 32}"),
        {"kind": "llama", "dtype": "float16"},
        "packed",
    ),
    "float32 checkpoint, a layer left in float": (
        ("quantize_matmul: {bits: 4, block_size: 32, exclude: [lm_head]}",),
        {"dtype": "float32"},
        "packed",
    ),
}


def genai_files(folder: Path) -> tuple[Path, Path, Path]:
    return folder / "onnx" / "model.onnx", folder / "genai", folder / "genai" / "model.onnx"


@pytest.mark.parametrize("case", CASES)
def test_onnxruntime_genai_computes_the_same(results: Callable[..., Path], case: str) -> None:
    passes, model, three_bit = CASES[case]
    folder = results(*passes, convert=f"convert: {{target: onnxruntime-genai, three_bit: {three_bit}}}", **model)
    manifest = json.loads((folder / "manifest.json").read_text())
    made, figures = manifest["hand_offs"]["genai"], manifest["quality"]["genai"]
    assert made["lowering_relative_error"] < 1e-5
    assert made["max_relative_error"] < 1e-4
    exact = figures["accuracy_level_0"]
    assert (exact["greedy_equal"], figures["tokenizer"]["equal"]) == (32, len(TEXTS))
    assert exact["cache_relative_error"] < 1e-4
    assert exact["perplexity"] == pytest.approx(figures["onnxruntime_perplexity"], rel=5e-5)
    assert figures["as_run"]["relative_error"] < 0.2
    nodes = {node.op_type for node in onnx.load(str(folder / "genai" / "model.onnx"), load_external_data=False).graph.node}
    assert {"GroupQueryAttention", "SkipSimplifiedLayerNormalization", "MatMulNBits"} <= nodes | {"MatMulNBits"}
    assert ("MatMul3Bits" in nodes) == (case == "mixed bits")


def test_folded_three_bits_take_four_on_the_disk(results: Callable[..., Path]) -> None:
    sizes = {}
    for three_bit in ("packed", "folded"):
        convert = f"convert: {{target: onnxruntime-genai, three_bit: {three_bit}}}"
        folder = results(NARROW, "quantize_matmul: {bits: 3, block_size: 32}", convert=convert)
        sizes[three_bit] = (folder / "genai" / "model.onnx.data").stat().st_size
        weights = json.loads((folder / "manifest.json").read_text())["weights"].values()
    codes = sum(one["shape"][0] * one["shape"][1] for one in weights)
    assert sizes["folded"] - sizes["packed"] == pytest.approx(codes / 8, rel=0.02), "a bit more for each code"


@pytest.mark.parametrize("three_bit", ["packed", "folded"])
def test_the_plan_states_its_size(tiny: Callable[..., Path], tmp_path: Path, store: Store, three_bit: str) -> None:
    model = tiny("qwen2", max_position_embeddings=4096, vocab_size=2000)
    path = tmp_path / "mine.yaml"
    convert = f"convert: {{target: onnxruntime-genai, three_bit: {three_bit}}}"
    path.write_text(recipe_text(model, NARROW, "quantize_matmul: {bits: 3, block_size: 32}", convert=convert))
    plan = make_plan(load_recipe(path), tmp_path / "build", None)
    folder = run_in_process(load_recipe(path), tmp_path / "build", store)
    made = (folder / "genai" / "model.onnx.data").stat().st_size
    assert plan.hand_off_bytes == {"onnxruntime-genai": pytest.approx(made, rel=0.005)}


def test_one_recipe_for_two_engines(results: Callable[..., Path]) -> None:
    convert = "convert: [{target: mnn-llm}, {target: onnxruntime-genai}]"
    folder = results(NARROW, "quantize_matmul: {bits: 3, block_size: 32}", convert=convert)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {name: one["target"] for name, one in manifest["hand_offs"].items()} == {
        "mnn": "mnn-llm",
        "genai": "onnxruntime-genai",
    }
    assert check_folder(folder)["weights"] == 2 * manifest["hand_offs"]["mnn"]["weights_checked"]


@pytest.fixture
def handed(results: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a finished folder, to be damaged."""
    folder = results(NARROW, "quantize_matmul: {bits: 3, block_size: 32}", convert=GENAI)
    return shutil.copytree(folder, tmp_path / "result")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("model.layers.0.mlp.up_proj.codes", r"up_proj: the code of weight \[0, \d\] differs"),
        ("model.layers.1.self_attn.qkv_proj.codes", r"1.self_attn.q_proj: the code of weight \[0, \d\] differs"),
        ("model.layers.1.self_attn.qkv_proj.scales", "q_proj: its scales differ in rows 0 to"),
        ("model.layers.1.self_attn.qkv_proj.zero_points", "q_proj: its zero_points differ in rows 0 to"),
        ("model.layers.0.self_attn.qkv_proj.bias", "model.layers.0.self_attn.q_proj.bias differ in rows"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight differ in rows 0 to"),
    ],
)
def test_one_bit_is_noticed(handed: Path, tensor: str, message: str, tmp_path: Path) -> None:
    source, folder, file = genai_files(handed)
    assert OnnxruntimeGenai.prove(source, folder, tmp_path).layers == 15
    stored = next(t for t in onnx.load(str(file), load_external_data=False).graph.initializer if t.name == tensor)
    place = {entry.key: entry.value for entry in stored.external_data}
    flip(folder / "model.onnx.data", int(place["offset"]))
    with pytest.raises(ConvertError, match=message):
        OnnxruntimeGenai.prove(source, folder, tmp_path)
    with pytest.raises(PipelineError, match=message):
        check_folder(handed)


def test_a_layer_that_is_missing_is_noticed(handed: Path, tmp_path: Path) -> None:
    source, folder, file = genai_files(handed)
    model = onnx.load(str(file), load_external_data=False)
    node = next(node for node in model.graph.node if node.name == "model.layers.0.mlp.up_proj")
    node.name = "model.layers.7.mlp.up_proj"
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ConvertError, match="has a layer 'model.layers.7.mlp.up_proj', which"):
        OnnxruntimeGenai.prove(source, folder, tmp_path)
    model.graph.node.remove(node)
    file.write_bytes(model.SerializeToString())
    with pytest.raises(ConvertError, match="lacks model.layers.0.mlp.up_proj"):
        OnnxruntimeGenai.prove(source, folder, tmp_path)


def test_the_configuration_says_what_the_checkpoint_does(handed: Path) -> None:
    found = json.loads((handed / "genai" / "genai_config.json").read_text())
    assert found["model"]["type"] == "qwen2"
    assert found["model"]["eos_token_id"] == [0]
    assert found["model"]["decoder"]["head_size"] == 16
    assert (found["model"]["context_length"], found["search"]["max_length"]) == (256, 256)
    assert found["search"]["past_present_share_buffer"] is True


def test_without_the_package_the_folder_is_made_and_says_so(
    results: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime_genai" else find(name))
    folder = results(NARROW, "quantize_matmul: {bits: 4, block_size: 64}", convert=GENAI)
    found = json.loads((folder / "manifest.json").read_text())
    assert found["quality"]["genai"] == {"skipped": "onnxruntime-genai is not installed: pip install 'lowbit[genai]'"}
    assert found["hand_offs"]["genai"]["bit_exact"] is True


def test_a_graph_whose_attention_is_not_understood_is_refused(results: Callable[..., Path]) -> None:
    with pytest.raises(PassError, match="qkv_proj makes queries, keys and values in one; put split_projections before"):
        results(NARROW, "quantize_matmul: {bits: 4, block_size: 32}", convert=GENAI, kind="phi3")
