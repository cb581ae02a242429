"""Encoders of text and images: exported, quantized, handed to MNN as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowbit.pipeline.commands.check import check_folder
from lowbit.pipeline.convert.mnn.tensors import Mnn
from lowbit.pipeline.errors import ConvertError, PipelineError
from lowbit.pipeline.runtime.session import open_reference
from tests.conftest import Exported
from tests.pipeline.convert.mnn.test_llm import flip

TEXT = ["bert", "roberta", "xlm-roberta", "distilbert"]
CASES: dict[str, tuple[tuple[str, ...], dict[str, Any], tuple[str, ...]]] = {
    **{f"{kind}": (("quantize_matmul: {bits: 4, block_size: 32}",), {"kind": kind}, ("last_hidden_state",)) for kind in TEXT},
    "embedding model": (
        ("pool_tokens: {mode: mean}", "quantize_matmul: {bits: 3, block_size: 64, method: mse}"),
        {"kind": "bert", "dtype": "float32"},
        ("sentence_embedding",),
    ),
    "classifier of texts": (
        ("split_gemm", "quantize_matmul: {bits: 8, block_size: 32, zero_point: integer}"),
        {"kind": "bert", "task": "text-classification"},
        ("logits",),
    ),
    "images": (
        ("quantize_matmul: {bits: 2, block_size: 32, symmetric: true}",),
        {"kind": "vit", "dtype": "float16"},
        ("last_hidden_state",),
    ),
    "classifier of images": (
        ("split_gemm", "quantize_matmul: {bits: 4, block_size: 32, zero_point: float}"),
        {"kind": "vit", "task": "image-classification"},
        ("logits",),
    ),
}


@pytest.mark.parametrize("kind", TEXT)
def test_encoders_of_text_compute_what_torch_computes(exported: Exported, kind: str) -> None:
    import torch
    from transformers import AutoModel

    checkpoint, graph = exported(kind)
    session = open_reference(graph)
    model = AutoModel.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(2, 300, (2, 9))
    mask = np.ones_like(ids)
    mask[1, 6:] = 0
    every = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
    feeds = {one.name: every[one.name] for one in session.get_inputs()}
    found = session.run(["last_hidden_state"], feeds)[0]
    with torch.no_grad():
        expected = model(**{name: torch.tensor(value) for name, value in feeds.items()}).last_hidden_state.numpy()
    real = mask.astype(bool)
    np.testing.assert_allclose(found[real], expected[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", ["feature-extraction", "image-classification"])
def test_encoders_of_images_compute_what_torch_computes(exported: Exported, task: str) -> None:
    import torch
    from transformers import AutoModel, AutoModelForImageClassification

    checkpoint, graph = exported("vit", task=task)
    make, output = (
        (AutoModel, "last_hidden_state") if task == "feature-extraction" else (AutoModelForImageClassification, "logits")
    )
    model = make.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    pixels = np.random.default_rng(0).standard_normal((2, 3, 32, 32)).astype(np.float32)
    found = open_reference(graph).run([output], {"pixel_values": pixels})[0]
    with torch.no_grad():
        expected = model(torch.tensor(pixels))[output].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def made(results: Callable[..., Path], case: str) -> tuple[Path, dict[str, Any]]:
    passes, model, _ = CASES[case]
    folder = results(*passes, convert="convert: {target: mnn}", **model)
    return folder, json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_mnn_computes_what_onnxruntime_computes(results: Callable[..., Path], case: str) -> None:
    folder, manifest = made(results, case)
    assert set(manifest["quality"]["onnxruntime"]["outputs"]) == set(CASES[case][2])
    high, low = (manifest["quality"]["mnn"][f"memory_{memory}"] for memory in ("high", "low"))
    assert set(high["outputs"]) == set(CASES[case][2])
    assert high["relative_error"] < 1e-4
    assert low["relative_error"] < 0.3, "int8 activations"
    assert manifest["hand_offs"]["mnn"]["bit_exact"] is True
    assert check_folder(folder)["weights"] == manifest["hand_offs"]["mnn"]["weights_checked"]


def test_one_bit_is_noticed(results: Callable[..., Path], tmp_path: Path) -> None:
    folder, _ = made(results, "bert")
    copy = tmp_path / "mnn"
    copy.mkdir()
    for file in (folder / "mnn").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    last = (copy / "model.mnn.weight").stat().st_size - 1
    flip(copy / "model.mnn.weight", last)
    with pytest.raises(ConvertError, match=r"the (scale|offset) of row \d+, block \d is"):
        Mnn.prove(folder / "onnx" / "model.onnx", copy, tmp_path)


@pytest.mark.parametrize(
    ("convert", "message"),
    [
        ("convert: {target: mnn-llm}", "target mnn-llm is for models that generate text; for this one .bert, 2 layers"),
        ("convert: {target: onnxruntime-genai}", "target onnxruntime-genai is for models that generate text"),
        ("calibrate: {windows: 2}", "calibrate looks at decoders only"),
    ],
)
def test_what_is_for_decoders_only_is_refused(results: Callable[..., Path], convert: str, message: str) -> None:
    method = "gptq" if "calibrate" in convert else "rtn"
    with pytest.raises(PipelineError, match=message):
        results(f"quantize_matmul: {{bits: 4, block_size: 32, method: {method}}}", convert=convert, kind="bert")


@pytest.mark.parametrize(("kind", "positions"), [("bert", 60), ("roberta", 60)])
def test_windows_longer_than_the_model_are_refused(results: Callable[..., Path], kind: str, positions: int) -> None:
    longest = positions - (2 if kind == "roberta" else 0)
    with pytest.raises(PipelineError, match=rf"a window of 64 tokens, but the model has {longest} positions. Set validate"):
        results("quantize_matmul: {bits: 4, block_size: 32}", convert="", kind=kind, max_position_embeddings=positions)


def test_a_quantized_embedding_is_refused(results: Callable[..., Path]) -> None:
    passes = ("quantize_embedding: {bits: 8, block_size: 32}", "quantize_matmul: {bits: 4, block_size: 32}")
    with pytest.raises(Exception, match="quantized by quantize_embedding, which target: mnn has no operator for"):
        results(*passes, convert="convert: {target: mnn}", kind="bert")


def test_a_decoder_is_refused(results: Callable[..., Path]) -> None:
    message = r"target mnn is for models that generate no text; .* set convert: {target: mnn-llm or onnxruntime-genai}"
    with pytest.raises(PipelineError, match=message):
        results("quantize_matmul: {bits: 4, block_size: 32}", convert="convert: {target: mnn}")
