"""The card that notebooks show, and the verdict in its head."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from lowbit.pipeline.recipe.sections import Validate
from lowbit.pipeline.report.html import result_card, verdict
from lowbit.pipeline.report.quality import Quality
from tests.pipeline.report.manifests import manifest, output_quality

PROVEN = "the same codes in ONNX and Fast and Absent, bit for bit"


def test_the_card_has_the_figures_that_matter() -> None:
    card = result_card(manifest())
    shown = [(card_of.findtext("b"), card_of.findtext("span")) for card_of in ElementTree.fromstring(card).iter("div")
             if card_of.get("class") == "card"]  # fmt: skip
    assert shown == [
        ("4.00 MB", "ONNX"), ("3.00 MB", "Fast"), ("3.50 MB", "Absent"), ("3.75", "bits per weight"),
        ("12.00", "perplexity, float model 10.00"), ("0.0500", "KL from the float model, nats per token"),
        ("90.0%", "same first choice"),
    ]  # fmt: skip
    assert "<b>&lt;mine&gt;</b>" in card, "what comes from outside is escaped"


def test_the_card_styles_nothing_else_of_a_notebook() -> None:
    style = re.search(r"<style>(.*?)</style>", result_card(manifest()), re.DOTALL)
    assert style is not None
    selectors = re.findall(r"([^{}]+)\{[^{}]*\}", re.sub(r"@media [^{]+\{|\}\s*\}", "}", style[1]))
    assert len(selectors) > 5
    for selector in selectors:
        assert all(part.strip(" }\n").startswith(".lowbit") for part in selector.split(",")), selector


def test_the_card_of_a_model_that_writes_no_text() -> None:
    card = result_card(manifest(Quality(onnxruntime=output_quality()), Validate()))
    assert "<b>3.00e-02</b><span>largest relative error of an output</span>" in card
    assert "perplexity" not in card


@pytest.mark.parametrize(
    ("limits", "word", "sentence"),
    [
        (Validate(), "done", f"no gate was set; {PROVEN}"),
        (Validate(max_kl_divergence=0.1), "passed", f"its gate is passed; {PROVEN}"),
        (Validate(max_kl_divergence=0.1, max_perplexity_ratio=2.0), "passed", f"all 2 gates are passed; {PROVEN}"),
        (Validate(max_kl_divergence=0.01), "missed", "max_kl_divergence is 0.0500, 0.01 is allowed"),
        (Validate(max_relative_error=0.1), "missed", "max_relative_error is not measured, 0.1 is allowed"),
    ],
)  # fmt: skip
def test_the_verdict(limits: Validate, word: str, sentence: str) -> None:
    assert verdict(manifest(limits=limits)) == (word, sentence)
