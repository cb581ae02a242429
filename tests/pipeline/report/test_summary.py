"""The closing table of a run, row by row."""

from __future__ import annotations

import pytest

from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.report.comparison import comparison_rows
from lowbit.pipeline.report.engine_quality import EngineOnOutputs, OutputMode, TemplateMatch, TokenizerMatch
from lowbit.pipeline.report.quality import Quality
from lowbit.pipeline.report.summary import closing_rows
from lowbit.pipeline.report.text_quality import ScoresAsRun
from tests.pipeline.report.manifests import engine_on_text, manifest, output_quality, text_quality

SIZES = [
    ("bits per weight", "3.750 (scales and zero points counted)"), ("bits, blocks, methods", "3/32 mse"), ("ONNX", "4.00 MB"),
    ("Fast", "3.00 MB"), ("Absent", "3.50 MB"),
]  # fmt: skip
TEXT = [
    ("perplexity", "12.00 (float model 10.00)"), ("KL divergence", "0.0500 nats per token over 62 tokens"),
    ("same top token", "90.0%"), ("worst window", "number 2, KL 0.0700"),
]  # fmt: skip
FAST = [
    ("Fast codes", "2,048 equal bit for bit"),
    ("Fast, float arithmetic", "logits within 3.0e-07 of onnxruntime, perplexity 12.00"),
    ("Fast, tokenizer", "the same ids for 14 of 15 texts; another for 'odd'"),
    ("Fast, chat template", "the same text for 3 of 3 conversations"),
]
ABSENT = [("Absent codes", "2,048 equal bit for bit"), ("Absent runtime", "not compared: it is not installed")]


def test_the_rows_of_a_model_that_writes_text() -> None:
    assert closing_rows(manifest()) == [*SIZES, *TEXT, *FAST, *ABSENT]


def test_its_own_arithmetic_has_a_row() -> None:
    text = text_quality()
    scores = {name: value for name, value in text if name in ScoresAsRun.model_fields} | {"kl_divergence": 0.06}
    as_run = ScoresAsRun(accuracy_levels=(4,), **scores)
    rows = closing_rows(manifest(Quality(onnxruntime=text.model_copy(update={"as_run": as_run}))))
    assert ("at accuracy_level 4", "perplexity 12.00, KL 0.0600") in rows


def test_the_rows_of_a_model_that_writes_none() -> None:
    made = manifest(Quality(onnxruntime=output_quality()), Validate())
    errors = output_quality().outputs
    engine = EngineOnOutputs(samples=4, exact=OutputMode(relative_error=2e-7, outputs=errors))
    made = made.model_copy(update={"quality": made.quality.with_figures(fast=engine)})
    said = {
        "logits": "relative error 2.00e-02, cosine similarity 0.99000 or more",
        "pooled": "relative error 3.00e-02, cosine similarity 0.98000 or more",
    }
    assert closing_rows(made) == [
        *SIZES, *said.items(), *((f"{name} at accuracy_level 4", text) for name, text in said.items()),
        FAST[0], ("Fast, float arithmetic", "outputs within 2.0e-07 of onnxruntime"), *ABSENT,
    ]  # fmt: skip


def test_without_validation_there_are_no_figures() -> None:
    assert closing_rows(manifest(Quality(), Validate())) == [*SIZES, *FAST, *ABSENT]


def test_a_tokenizer_and_a_template_that_differ_are_said() -> None:
    engine = engine_on_text().model_copy(
        update={
            "tokenizer": TokenizerMatch(texts=15, equal=15, example=None),
            "chat_template": TemplateMatch(conversations=3, equal=2, example="Fast refuses it"),
        }
    )
    made = manifest()
    rows = dict(closing_rows(made.model_copy(update={"quality": made.quality.with_figures(fast=engine)})))
    assert rows["Fast, tokenizer"] == "the same ids for 15 of 15 texts"
    assert rows["Fast, chat template"] == "the same text for 2 of 3 conversations: Fast refuses it"


@pytest.mark.parametrize(
    ("quality", "limits", "row"),
    [
        (Quality(onnxruntime=text_quality(), plain_rtn=text_quality(0.08)), Validate(max_kl_divergence=0.1),
         ("mine", "3.00 MB", "3.750", "12.00", "0.0500", "0.0800", "90.0%", "passed", "4 s")),
        (Quality(onnxruntime=text_quality()), Validate(max_kl_divergence=0.01, max_perplexity_ratio=2.0),
         ("mine", "3.00 MB", "3.750", "12.00", "0.0500", "", "90.0%", "missed 1/2", "4 s")),
        (Quality(onnxruntime=output_quality()), Validate(), ("mine", "3.00 MB", "3.750", "", "", "", "", "", "4 s")),
        (Quality(), Validate(), ("mine", "3.00 MB", "3.750", "", "", "", "", "", "4 s")),
    ],
)  # fmt: skip
def test_the_row_of_a_comparison(quality: Quality, limits: Validate, row: tuple[str, ...]) -> None:
    assert comparison_rows([("mine", manifest(quality, limits))], {}) == [row]
