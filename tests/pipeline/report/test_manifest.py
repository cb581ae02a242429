"""manifest.json by its model: what is read is what was written, and what is damaged is named."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from lowbit.pipeline.errors import PipelineError
from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.report.make_manifest import seal_manifest
from lowbit.pipeline.report.manifest import Manifest, read_manifest
from lowbit.pipeline.report.quality import Quality
from lowbit.pipeline.store.digests import sha256
from tests.pipeline.report.manifests import manifest, output_quality, text_quality


def write(folder: Path, content: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps(content), "utf-8")


def test_what_is_read_is_what_was_sealed(tmp_path: Path) -> None:
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "model.onnx").write_bytes(b"1234")
    sealed = seal_manifest(tmp_path, manifest())
    assert sealed.files == {"onnx/model.onnx": sha256(tmp_path / "onnx" / "model.onnx")}
    assert read_manifest(tmp_path) == sealed


@pytest.mark.parametrize("quality", [Quality(), Quality(onnxruntime=output_quality()), Quality(plain_rtn=text_quality())])
def test_figures_that_were_not_measured_are_left_out(quality: Quality) -> None:
    made = manifest(quality, Validate())
    content = made.model_dump(mode="json")
    assert set(content["quality"]) == {name for name, found in quality if found is not None} | {"fast", "absent"}
    assert "as_run" not in content["quality"].get("plain_rtn", {})
    assert Manifest.model_validate_json(json.dumps(content)) == made


def test_figures_are_attributes() -> None:
    made = manifest()
    assert (made.quality.kl_divergence, made.quality.perplexity, made.quality.perplexity_ratio) == (0.05, 12.0, 1.2)
    assert made.quality.relative_error is None
    assert (made.size.fast_bytes, made.size.of("absent"), made.size.of("onnx")) == (3_000_000, 3_500_000, 4_000_000)
    assert made.quality.engines["fast"].modes["exact"].greedy_equal == 32  # type: ignore[union-attr]
    assert (made.folders, made.seconds, made.missed) == (["onnx", "fast", "absent"], 3.5, [])
    others = Quality(onnxruntime=output_quality())
    assert (others.kl_divergence, others.perplexity, others.relative_error) == (None, None, 0.03)


def test_facts_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        manifest().recipe = "another"
    with pytest.raises(ValidationError, match="frozen"):
        manifest().size.fast_bytes = 1
    with pytest.raises(AttributeError, match="slow_bytes"):
        _ = manifest().size.slow_bytes


def test_gates_are_held_against_the_figures() -> None:
    made = manifest(limits=Validate(max_kl_divergence=0.01, max_perplexity_ratio=1.2))
    assert [(gate.name, gate.allowed, gate.found, gate.passed) for gate in made.gates] == [
        ("max_kl_divergence", 0.01, 0.05, False), ("max_perplexity_ratio", 1.2, 1.2, True),
    ]  # fmt: skip
    assert [gate.name for gate in made.missed] == ["max_kl_divergence"]
    (gate,) = manifest(Quality(onnxruntime=output_quality()), Validate(max_relative_error=0.03)).gates
    assert (gate.found, gate.passed) == (0.03, True)
    (gate,) = manifest(Quality(), Validate(max_relative_error=0.03)).gates
    assert (gate.found, gate.passed) == (None, False)


def test_what_is_no_number_passes_no_gate_and_can_be_read(tmp_path: Path) -> None:
    made = manifest(Quality(onnxruntime=text_quality(math.nan)))
    seal_manifest(tmp_path, made)
    assert [gate.passed for gate in read_manifest(tmp_path).gates] == [False, True]


def at(*path: str | int) -> Callable[[Any, Any], None]:
    """Sets, or with None removes, a value in a manifest."""

    def change(content: Any, value: Any) -> None:
        for part in path[:-1]:
            content = content[part]
        if value is None:
            del content[path[-1]]
        else:
            content[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "value", "said"),
    [
        (at("quality", "onnxruntime", "perplexity"), "12", "quality.onnxruntime.perplexity is '12'; expected a valid number."),
        (at("quality", "onnxruntime", "perplexity"), None, "quality.onnxruntime.perplexity is missing."),
        (at("quality", "onnxruntime"), 5, "quality.onnxruntime is 5; expected an object."),
        (at("quality", "onnxruntime", "worst_windows", 0, "flips", 0, "extra"), 1,
         "quality.onnxruntime.worst_windows.0.flips.0.extra means nothing here."),
        (at("quality", "fast", "exact", "greedy_equal"), 1.5, "quality.fast.exact.greedy_equal is 1.5; expected a valid int"),
        (at("quality", "fast"), None, "quality has figures of ['absent'], hand_offs names ['absent', 'fast']."),
        (at("quality", "slow"), {"skipped": "?"}, "quality has figures of ['absent', 'fast', 'slow'], hand_offs names"),
        (at("size", "fast_bytes"), None, "size lacks the bytes of fast."),
        (at("size", "onnx_bytes"), 1.5, "size.onnx_bytes is 1.5; expected a valid integer"),
        (at("gates", 0, "passed"), False, "the gate max_kl_divergence does not follow from the figures in quality."),
        (at("gates", 0, "found"), 0.01, "the gate max_kl_divergence does not follow from the figures in quality."),
        (at("quality", "onnxruntime", "kl_divergence"), 0.2, "the gate max_kl_divergence does not follow from"),
        (at("weights", "lm_head", "shape"), [64], "weights.lm_head.shape.1 is missing."),
        (at("steps", 0, "extra"), 1, "steps.0.extra means nothing here."),
        (at("hand_offs", "fast", "bit_exact"), False, "hand_offs.fast.bit_exact is False; expected True."),
        (at("model"), None, "model is missing."),
        (at("more"), 1, "more means nothing here."),
    ],
)  # fmt: skip
def test_what_is_damaged_is_named(tmp_path: Path, change: Callable[[Any, Any], None], value: Any, said: str) -> None:
    content = manifest().model_dump(mode="json")
    change(content, value)
    write(tmp_path, content)
    with pytest.raises(PipelineError) as error:
        read_manifest(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / 'manifest.json'}: damaged: {said}")
    assert str(error.value).endswith(". Run the recipe again.")


@pytest.mark.parametrize(("version", "which"), [(None, "an earlier"), (0, "an earlier"), (2, "a later")])
def test_other_versions_are_refused(tmp_path: Path, version: int | None, which: str) -> None:
    content = manifest().model_dump(mode="json")
    at("version")(content, version)
    write(tmp_path, content)
    with pytest.raises(
        PipelineError, match=f"made by {which} version. Run the recipe again; what is known already is recalled"
    ):
        read_manifest(tmp_path)


@pytest.mark.parametrize("text", ["{}", "[]", "1", '{"files": {}, "weights": {}}'])
def test_another_file_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(PipelineError, match=r"manifest\.json: damaged: it is not a manifest of a finished run"):
        read_manifest(tmp_path)
