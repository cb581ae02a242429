"""The comparison of tokenizers: equal ids, and an example where they are not."""

from __future__ import annotations

from tokenizers import Tokenizer

from pipeline.convert.mnn_tokens import TEXTS, compare_ids
from tests.conftest import PYDOCS


def test_the_first_text_that_differs_is_the_example() -> None:
    tokenizer = Tokenizer.from_file(str(PYDOCS / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in TEXTS]
    assert compare_ids(ids, tokenizer) == {"texts": len(TEXTS), "equal": len(TEXTS), "example": None}
    ids[3] = ids[3][:-1]
    ids[7] = []
    assert compare_ids(ids, tokenizer) == {"texts": len(TEXTS), "equal": len(TEXTS) - 2, "example": TEXTS[3]}
