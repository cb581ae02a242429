"""A manifest in memory, with figures of every kind."""

from __future__ import annotations

from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.report.engine_quality import EngineOnText, NotCompared, TemplateMatch, TextMode, TokenizerMatch
from lowbit.pipeline.report.gates import gates
from lowbit.pipeline.report.manifest import VERSION, Manifest
from lowbit.pipeline.report.output_quality import OutputError, OutputQuality, OutputsAsRun
from lowbit.pipeline.report.quality import Quality
from lowbit.pipeline.report.records import HandOff, Size, Source, StepRecord, WeightRecord
from lowbit.pipeline.report.text_quality import Continuation, Flip, TextQuality, WorstWindow

GATES = Validate(max_kl_divergence=0.1, max_perplexity_ratio=1.5)


def text_quality(kl_divergence: float = 0.05) -> TextQuality:
    flip = Flip(position=3, kl_divergence=0.5, before="a", next="b", reference="b", candidate="c")
    return TextQuality(
        perplexity=12.0, reference_perplexity=10.0, kl_divergence=kl_divergence, top1_agreement=0.9, tokens=62, window=32,
        worst_window=1, worst_window_kl=0.07, kl_by_position=(0.04, 0.06),
        worst_windows=(WorstWindow(window=1, kl_divergence=0.07, flips=(flip,)),),
        continuations=(Continuation(prompt="The", float=" cat sat", onnxruntime=" cat ran"),),
    )  # fmt: skip


def output_quality() -> OutputQuality:
    errors = {
        "logits": OutputError(relative_error=0.02, least_cosine=0.99),
        "pooled": OutputError(relative_error=0.03, least_cosine=0.98),
    }
    return OutputQuality(samples=4, outputs=errors, as_run=OutputsAsRun(accuracy_levels=(4,), outputs=errors))


def engine_on_text() -> EngineOnText:
    mode = TextMode(
        relative_error=3e-7, cache_relative_error=2e-7, perplexity=12.0, greedy_equal=32, continuations=(" cat ran",)
    )
    return EngineOnText(
        onnxruntime_perplexity=12.0, tokens=62, tokenizer=TokenizerMatch(texts=15, equal=14, example="odd"),
        chat_template=TemplateMatch(conversations=3, equal=3, example=None), exact=mode,
    )  # fmt: skip


def manifest(quality: Quality | None = None, limits: Validate = GATES) -> Manifest:
    """A result that was handed to two engines, one of which is not here."""
    engines = {"fast": engine_on_text(), "absent": NotCompared(skipped="it is not installed")}
    quality = quality or Quality(onnxruntime=text_quality())
    quality = quality.with_figures(**engines)
    weight = WeightRecord(
        shape=(64, 32), bits=3, block_size=32, symmetric=False, zero_point="integer", method="mse", mse=1e-5,
        relative_error=0.2, bits_per_weight=3.75, source_sha256="a" * 64, codes_sha256="b" * 64,
    )  # fmt: skip
    hand_off = HandOff(
        target="fast-llm", options={"scale_dtype": "fp16"}, label="Fast", modes={"exact": "float arithmetic"}, usage="",
        bit_exact=True, weights_checked=2048, lowering_relative_error=None, max_relative_error=3e-7,
    )  # fmt: skip
    return Manifest(
        version=VERSION, recipe="<mine>",
        model=Source(source="./m", revision=None, digest="c" * 64, shards={"f": {"w": "a" * 64}}), versions={"numpy": "2"},
        steps=(
            StepRecord(name="export", options={"opset": 18}, key="d" * 64, seconds=1.5),
            StepRecord(name="validate", options={}, seconds=2.0),
        ),
        weights={"model.layers.0.mlp.up_proj": weight, "lm_head": weight},
        size=Size(bits_per_weight=3.75, onnx_bytes=4_000_000, fast_bytes=3_000_000, absent_bytes=3_500_000),
        quality=quality, hand_offs={"fast": hand_off, "absent": hand_off.model_copy(update={"label": "Absent"})},
        model_type="llama", recipe_text="model: ./m\n", gates=gates(limits, quality), files={"onnx/model.onnx": "e" * 64},
    )  # fmt: skip
