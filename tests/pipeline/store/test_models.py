"""Models in a store: computed once, recalled equal, computed anew when they are no longer such models."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import TypeAdapter

from lowbit.pipeline.report.engine_quality import Compared
from lowbit.pipeline.report.text_quality import TextQuality
from lowbit.pipeline.store.models import recall_model
from lowbit.pipeline.store.store import Store
from tests.pipeline.report.manifests import engine_on_text, text_quality

KEY = "a" * 64


def test_a_model_is_computed_once(tmp_path: Path) -> None:
    calls = []

    def compute() -> Compared:
        calls.append(1)
        return engine_on_text()

    store, kind = Store(tmp_path), TypeAdapter[Compared](Compared)
    assert recall_model(store, KEY, kind, compute) == (engine_on_text(), False)
    assert recall_model(store, KEY, kind, compute) == (engine_on_text(), True)
    assert len(calls) == 1


def test_facts_of_another_kind_are_computed_anew(tmp_path: Path) -> None:
    store, kind = Store(tmp_path), TypeAdapter(TextQuality)
    store.put(KEY, lambda _: {"perplexity": 1.0})
    assert recall_model(store, KEY, kind, text_quality) == (text_quality(), False)
    assert recall_model(store, KEY, kind, text_quality) == (text_quality(), True)


def test_what_is_no_number_is_recalled_as_such(tmp_path: Path) -> None:
    store, kind = Store(tmp_path), TypeAdapter(TextQuality)
    recall_model(store, KEY, kind, lambda: text_quality(math.nan))
    found, recalled = recall_model(store, KEY, kind, text_quality)
    assert recalled
    assert math.isnan(found.kl_divergence)
