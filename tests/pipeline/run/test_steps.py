"""The list of steps: what a plan prints, what depends on what."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lowbit.pipeline.commands.plan import make_plan
from lowbit.pipeline.recipe.load import load_recipe
from tests.running import run_in_process
from tests.tiny import recipe_text, task_of

QUIET = Console(quiet=True)
EVERYTHING = (
    "narrow_embedding: {dtype: bf16}",
    "quantize_matmul: {bits: 3, block_size: 32, method: gptq}",
    "fold_channel_scales: {ratios: 2}",
    "finetune_blocks: {epochs: 1}",
)
CALIBRATE = "calibrate: {windows: 2, window: 32}\n"


@pytest.fixture
def steps_of(tiny: Callable[..., Path], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Runs a recipe in one build folder and returns its steps as the manifest has them, after comparing them with the plan."""

    def run(*passes: str, convert: str = "", validate: str = "validate: {window: 32, windows: 2}", **model: Any) -> Any:
        file = tmp_path / "mine.yaml"
        task = task_of(model.get("kind", "qwen2"))
        file.write_text(recipe_text(tiny(**model), *passes, convert=convert, validate=validate, task=task), "utf-8")
        folder = run_in_process(load_recipe(file), tmp_path / "build")
        steps = json.loads((folder / "manifest.json").read_text("utf-8"))["steps"]
        assert list(make_plan(load_recipe(file), tmp_path / "build", None).steps) == [step["name"] for step in steps]
        return steps

    return run


def cached(steps: list[dict[str, Any]]) -> set[str]:
    return {step["name"] for step in steps if step["cached"]}


def test_everything_that_reads_text(steps_of: Callable[..., list[dict[str, Any]]]) -> None:
    steps = steps_of(*EVERYTHING, convert=CALIBRATE + "convert: {target: onnxruntime-genai}")
    assert [step["name"] for step in steps] == [
        "export", "rehearse", "narrow_embedding", "quantize_matmul", "fold_channel_scales",
        "finetune_blocks", "calibration text", "channel scales", "calibrate", "finetune", "write onnx", "verify codes",
        "reference", "plain rtn", "validate", "lower", "convert", "prove", "compare runtimes",
    ]  # fmt: skip
    assert len({step["key"] for step in steps}) == len(steps)


def test_encoders_are_validated_once(steps_of: Callable[..., list[dict[str, Any]]]) -> None:
    passes = ("pool_tokens: {mode: mean}", "quantize_matmul: {bits: 4, block_size: 32}")
    first = steps_of(*passes, kind="bert")
    assert "validate" not in cached(first)
    again = steps_of(*passes, kind="bert", validate="validate: {window: 32, windows: 2, max_relative_error: 10.0}")
    assert {"export", "write onnx", "validate"} <= cached(again), "a gate changes no figure"
    assert "validate" not in cached(steps_of("pool_tokens: {mode: cls}", passes[1], kind="bert")), "another output"
    assert "validate" not in cached(steps_of(*passes, kind="bert", validate="validate: {window: 16, windows: 2}"))


def test_figures_of_calibrated_models_depend_on_every_pass(steps_of: Callable[..., list[dict[str, Any]]]) -> None:
    """The codes are the same, but not the embedding beside them."""
    quantize = "quantize_matmul: {bits: 3, block_size: 32, method: weighted_mse, exclude: [lm_head]}"
    steps_of("narrow_embedding: {dtype: bf16}", quantize, convert=CALIBRATE)
    again = steps_of("narrow_embedding: {dtype: bf16}", quantize, convert=CALIBRATE)
    assert {"calibrate", "write onnx", "reference", "validate"} <= cached(again)
    other = steps_of(quantize, convert=CALIBRATE)
    assert "validate" not in cached(other)
