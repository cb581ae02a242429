"""What is chosen for each kind of model by whoever names only the model and its bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from rich.console import Console

import lowbit
from lowbit.passes import QuantizeMatmul
from lowbit.pipeline.checkpoint.huggingface import open_checkpoint
from lowbit.pipeline.commands import quantize
from lowbit.pipeline.store.store import Store

QUIET = Console(quiet=True)
SHORT: dict[str, Any] = {"windows": 1, "window": 64}


def content(recipe: lowbit.Recipe) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(recipe.text)
    return found


def test_a_decoder_for_mnn(tiny: Callable[..., Path]) -> None:
    """The output layer has four bits; offsets are free in MNN, and needed below four bits."""
    made = lowbit.recipe_for(tiny("llama"), bits=3)
    assert made.name.endswith("-q3")
    found = content(made)
    assert found["passes"] == [
        "remove_identities",
        "narrow_embedding",
        {"quantize_matmul": {"bits": 4, "block_size": 64, "method": "mse", "zero_point": "float", "include": ["lm_head"]}},
        {"quantize_matmul": {"bits": 3, "block_size": 64, "method": "mse", "zero_point": "float"}},
    ]
    assert found["convert"] == {"compare": "quick", "target": "mnn-llm"}
    assert made.said == ()
    both = content(lowbit.recipe_for(tiny("llama"), bits=2, convert=["onnxruntime-genai", "mnn-llm"]))
    assert [one["target"] for one in both["convert"]] == ["onnxruntime-genai", "mnn-llm"]
    assert "zero_point" not in both["passes"][-1]["quantize_matmul"], "onnxruntime is slow with float ones"


def test_an_embedding_that_mnn_cannot_hold_is_narrowed_and_it_is_said(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """For MNN, from Python's passes too; and such a model runs."""
    model = tiny("llama", dtype="float32", tie_word_embeddings=True)
    made = lowbit.recipe_for(model, [QuantizeMatmul(bits=4, block_size=32)], validate=SHORT, name="mine")
    assert content(made)["passes"][-1] == {"narrow_embedding": {"dtype": "fp16"}}
    assert made.said == ("mnn-llm holds no float32 embedding: it is narrowed to fp16, which is part of what is validated",)
    assert made.run(tmp_path, console=QUIET).manifest.hand_offs["mnn"].bit_exact
    assert lowbit.recipe_for(model, bits=4, convert="onnxruntime-genai").said == ()
    own = lowbit.recipe_for(model, [{"narrow_embedding": {"dtype": "bf16"}}, {"quantize_matmul": {"bits": 4}}])
    assert content(own)["passes"] == [
        "remove_identities",
        {"narrow_embedding": {"dtype": "bf16"}},
        {"quantize_matmul": {"bits": 4}},
    ]


def test_what_a_model_or_a_method_needs_is_added_and_said(tiny: Callable[..., Path]) -> None:
    fused = lowbit.recipe_for(tiny("phi3"), bits=4)
    assert "split_projections" in content(fused)["passes"]
    assert fused.said == ("fused projections are split, so that each gets its own codes",)
    calibrated = lowbit.recipe_for(tiny("llama"), bits=4, method="gptq")
    assert content(calibrated)["calibrate"] == {"text": "library"}
    assert "calibrated on docstrings" in calibrated.said[0]


def test_a_large_model_is_validated_on_little_text(flagship: Callable[[], Path], tmp_path: Path) -> None:
    made = lowbit.recipe_for(flagship(), fit="3.2GB")
    found = content(made)
    assert found["validate"] == {"windows": 2}
    assert found["passes"][-1]["allocate_bits"]["sensitivity"] == "fisher"
    assert "minutes" in made.said[0]


@pytest.mark.parametrize(
    ("kind", "task"), [("bert", "feature-extraction"), ("bert", "text-classification"), ("vit", "image-classification")]
)
def test_encoders_get_what_encoders_need(
    tiny: Callable[..., Path], tmp_path: Path, export: Callable[..., Path], kind: str, task: str
) -> None:
    export(kind, Store(tmp_path / ".store"), task=task)
    made = lowbit.recipe_for(tiny(kind, task=task), bits=4, block_size=32, name="mine")
    assert content(made)["export"] == {"task": task}
    assert content(made)["convert"] == {"target": "mnn", "compare": "quick"}
    assert content(made)["validate"] == {"windows": 4, "window": 256}, "it has no more positions"
    assert made.run(tmp_path, console=QUIET).manifest.hand_offs["mnn"].bit_exact


def test_an_onnx_file_is_not_exported(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["": 18]> g (float[1, 64] x) => (float[1, 512] y) { y = MatMul (x, a_weight) }'
    model = onnx.parser.parse_model(text)
    weight = onnx.helper.make_tensor("a_weight", 1, [64, 512], [i / 4e4 for i in range(64 * 512)])
    model.graph.initializer.append(weight)
    onnx.save(model, tmp_path / "My Own.onnx")
    made = lowbit.recipe_for(tmp_path / "My Own.onnx", bits=4, block_size=32)
    assert made.name == "my-own-q4"
    assert "export" not in content(made)
    assert made.run(tmp_path / "build", console=QUIET).size.onnx_bytes > 0


def test_a_model_of_the_hub_is_pinned(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """To the commit that was looked at, or the recipe might be another model's tomorrow."""
    monkeypatch.setattr(quantize, "open_model", lambda source: open_checkpoint(tiny("llama"), source, "a1b2c3"))
    made = lowbit.recipe_for("Some/Tiny-Llama", bits=3)
    assert content(made)["model"] == {"source": "Some/Tiny-Llama", "revision": "a1b2c3"}
    assert made.name == "tiny-llama-q3"


def test_contradictions_are_said(tiny: Callable[..., Path], tmp_path: Path) -> None:
    for options, message in (
        ({"bits": 3, "fit": "1MB"}, "bits 3 and fit 1MB contradict each other"),
        ({"passes": ["remove_identities"], "bits": 3}, "give either passes, or bits or fit"),
        ({"bits": 5}, r"passes\[2\]\.quantize_matmul\.bits: bits is 5; expected 2, 3, 4 or 8"),
        ({"convert": "tpu"}, "target is 'tpu'; expected 'mnn-llm',"),
    ):
        with pytest.raises(lowbit.PipelineError, match=message):
            lowbit.recipe_for(tiny("llama"), **options)  # type: ignore[arg-type]
    with pytest.raises(lowbit.PipelineError, match="none: no such checkpoint folder"):
        lowbit.recipe_for(tmp_path / "none", bits=4)
    with pytest.raises(lowbit.PipelineError, match="cannot be fetched from the Hugging Face Hub"):
        lowbit.recipe_for("no such/thing", bits=4)
