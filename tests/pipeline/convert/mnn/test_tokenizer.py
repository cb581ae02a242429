"""tokenizer.mtok in MNN's own tokenizer against the tokenizers library, and what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from lowbit.pipeline.checkpoint.chat_template import chat_template
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.convert.mnn.tokenizer import tokenizer_bytes
from lowbit.pipeline.errors import ConvertError
from tests.conftest import PYDOCS

QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"\p{N}|", r"\p{N}{1,3}|")

TEXTS = [
    "Hello world",
    "  two  spaces,\ttabs\nand\r\nlines\n\n",
    "It's 12345 o'clock; they'll pay $3.50 (or 99%)!",
    "def f(x):\n    return x ** 2  # comment",
    "naïve café Ångström",
    "cafe\u0301 A\u030angstro\u0308m",
    "你好，世界。こんにちは 안녕하세요",
    "مرحبا بالعالم שלום",
    "👩\u200d👩\u200d👧\u200d👦 🇩🇪 👍🏽 🙂",
    "<|end|>special<|end|> in <|en the middle",
    "\u00a0\u2003\u3000odd spaces\u200b",
    "ǅ ﬁ ½ Ⅷ ①",
    "a" * 300,
    "",
    " ",
    "\n",
]


def byte_level(pattern: str | None, nfc: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, plain]) if split else plain
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def sentence_piece_like() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "<|end|>", *bytes_], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[:4], trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if not t["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "<|end|>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(TEXTS[:4] * 5, trainer)
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte level": lambda: byte_level(None, False),
    "qwen": lambda: byte_level(QWEN, True),
    "llama 3": lambda: byte_level(LLAMA3, False),
    "sentence piece": sentence_piece_like,
    "unigram": unigram,
    "pydocs": lambda: Tokenizer.from_file(str(PYDOCS / "tokenizer.json")),
}

ENCODE = """
import json, sys
import MNN.llm as llm
model = llm.create(sys.argv[1]); model.load()
print("RESULT" + json.dumps([model.tokenizer_encode(text) for text in json.loads(open(sys.argv[2], encoding="utf-8").read())]))
"""


def encoded(results: Callable[..., Path], tmp_path: Path, tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """What MNN makes of texts with our file of a tokenizer."""
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text("{}")
    tokenizer.save(str(source / "tokenizer.json"))
    done = results("narrow_embedding", "quantize_matmul: {bits: 4, block_size: 32}")
    folder = shutil.copytree(done / "mnn", tmp_path / "mnn")
    (folder / "tokenizer.mtok").write_bytes(tokenizer_bytes(Checkpoint(source, "x")))
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    command = [sys.executable, "-c", ENCODE, str(folder / "config.json"), str(tmp_path / "texts.json")]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return list(json.loads(output.split("RESULT")[1].splitlines()[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_those_of_tokenizers(results: Callable[..., Path], tmp_path: Path, family: str) -> None:
    tokenizer = FAMILIES[family]()
    found = encoded(results, tmp_path, tokenizer, TEXTS)
    expected = [tokenizer.encode(text).ids for text in TEXTS]
    assert dict(zip(TEXTS, found, strict=True)) == dict(zip(TEXTS, expected, strict=True))


def checkpoint(folder: Path, tokenizer: dict[str, Any], **files: Any) -> Checkpoint:
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return Checkpoint(folder, "x")


BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        ({"model": {"type": "WordPiece", "vocab": {}}}, "is not handed models of type WordPiece; BPE and Unigram are"),
        ({"model": BPE, "normalizer": {"type": "Nmt"}}, "MNN's tokenizer has no normalizer {'type': 'Nmt'}"),
        ({"model": BPE, "pre_tokenizer": {"type": "UnicodeScripts"}}, "has no pre_tokenizer"),
        (
            {"model": BPE, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}},
            "that adds a space is not supported",
        ),
        ({"model": BPE, "decoder": {"type": "CTC"}}, "has no decoder"),
        (
            {"model": BPE, "normalizer": {"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}},
            "a normalizer that replaces by the regex 'a\\+' is not supported",
        ),
        ({"model": {"vocab": {"a" * 70000: 0}, "merges": []}}, "longer than MNN's 65535"),
    ],
)
def test_what_the_format_cannot_say_is_refused(tmp_path: Path, tokenizer: dict[str, Any], message: str) -> None:
    with pytest.raises(ConvertError, match=message):
        tokenizer_bytes(checkpoint(tmp_path, tokenizer))


def test_without_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConvertError, match=r"no tokenizer.json, so MNN could not read any text"):
        tokenizer_bytes(Checkpoint(tmp_path, "x"))


def test_header_lists_special_stop_and_prefix_tokens(tmp_path: Path) -> None:
    tokenizer = {
        "model": BPE,
        "added_tokens": [{"id": 7, "content": "<e>", "special": True}, {"id": 9, "content": "x", "special": False}],
    }
    generation = {"eos_token_id": [7, 5]}
    config = {"eos_token": {"content": "<e>"}}
    found = tokenizer_bytes(checkpoint(tmp_path, tokenizer, generation_config=generation, tokenizer_config=config))
    assert found.startswith(b"430 4\n1 2 0\n7 5 7\n")


def test_chat_template_comes_from_either_file(tmp_path: Path) -> None:
    tokenizer = checkpoint(tmp_path, {"model": BPE})
    assert chat_template(tokenizer) == ""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": [{"name": "default", "template": "named"}]}))
    assert chat_template(tokenizer) == "named"
    (tmp_path / "chat_template.jinja").write_text("from the file")
    assert chat_template(tokenizer) == "from the file", "it comes first, as in transformers"


SCRIPTS = st.sampled_from(
    [
        "Latin words ",
        "Ελληνικά ",
        "кириллица ",
        "مرحبا ",
        "שלום ",
        "नमस्ते ",
        "你好世界",
        "カタカナ",
        "안녕 ",
        "ไทย ",
        "👩\u200d👧 ",
        "🇩🇪",
        "👍🏽 ",
    ]
)
CHARACTERS = st.characters(blacklist_categories=("Cs", "Cc", "Cn", "Co", "Zl", "Zp"))
"""Any, but: surrogates and unassigned ones, which mean nothing; and control characters and line separators, which MNN's regular
expressions read in their own way in front of letters (a run reports such texts)."""
PIECES = st.one_of(
    st.text(CHARACTERS, max_size=12), SCRIPTS, st.integers(0, 10**12).map(str),
    st.sampled_from(["<|end|>", "\n", "\r\n", "\t", "  ", "'s", "'LL", " $3.50", "```\n", "\\frac{1}{2}"]),
)  # fmt: skip
STRINGS = st.lists(PIECES, max_size=8).map("".join)


def composes(text: str) -> bool:
    """Whether NFC by replacement is NFC: several combining marks on one letter it does not put in order."""
    marks = [unicodedata.combining(char) > 0 for char in unicodedata.normalize("NFD", text)]
    return not any(a and b for a, b in itertools.pairwise(marks))


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_equal_those_of_tokenizers_on_a_thousand_strings(results: Callable[..., Path], tmp_path: Path, family: str) -> None:
    texts: list[str] = []

    @settings(max_examples=1000, suppress_health_check=list(HealthCheck))
    @given(STRINGS)
    def gather(text: str) -> None:
        texts.append(text)

    gather()
    if family == "qwen":
        texts = [text for text in texts if composes(text)]
    assert len(texts) > 800
    tokenizer = FAMILIES[family]()
    found = encoded(results, tmp_path, tokenizer, texts)
    different = [text for text, ids in zip(texts, found, strict=True) if tokenizer.encode(text).ids != ids]
    assert not different, f"{len(different)} of {len(texts)}: {different[:5]!r}"
