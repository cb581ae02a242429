"""More files that mean harm, of checkpoints, in families: each option with each wrong value, each file as each wrong thing."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from lowbit.pipeline.checkpoint.huggingface import INDEX, SIDE_FILES, WHOLE
from lowbit.pipeline.limits import TEXT_BYTES
from tests.hostile.corpus import checkpoint, edit, many, recipe

NUMBERS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size",
    "max_position_embeddings", "head_dim", "num_experts", "image_size", "patch_size", "num_labels", "pad_token_id",
    "rope_theta",
)  # fmt: skip
WRONG: dict[str, Any] = {
    "text": "x", "negative": -7, "list": [1], "mapping": {"a": 1}, "huge": 1 << 60, "boolean": True, "infinite": float("inf"),
}  # fmt: skip


@many("config.json: ", **{f"{name}_{kind}": {name: value} for name in NUMBERS for kind, value in WRONG.items()})
def option(folder: Path, good: Path, changes: dict[str, Any]) -> Path:
    edit(checkpoint(folder, good) / "config.json", **changes)
    return recipe(folder)


@many(
    "config.json: ",
    patches={"image_size": 3000, "patch_size": 1}, labels={"id2label": {str(i): "x" for i in range(200_000)}},
    markup={"model_type": "[/b]"}, control={"model_type": "llama\x1b[2J"}, a_list={"model_type": ["llama"]},
    rope={"rope_scaling": {"rope_type": "linear", "factor": float("nan")}}, rope_text={"rope_scaling": "linear"},
    rope_5={"rope_parameters": {"rope_theta": float("inf")}}, rope_5_text={"rope_parameters": "x"}, no_rope={"rope_theta": 0},
    fewer={"num_hidden_layers": 1}, act={"hidden_act": 7},
    no_act={"hidden_act": "nonsense"}, tied={"tie_word_embeddings": "yes"},
    end={"eos_token_id": -1}, begin={"bos_token_id": 1.5}, heads={"num_attention_heads": 7}, epsilon={"rms_norm_eps": "1e-6"},
)  # fmt: skip
def options(folder: Path, good: Path, changes: dict[str, Any]) -> Path:
    edit(checkpoint(folder, good) / "config.json", **changes)
    return recipe(folder)


def _large(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(TEXT_BYTES + 1)


THINGS: dict[str, Any] = {
    "folder": Path.mkdir, "pipe": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"),
    "link": lambda path: path.symlink_to("../canary"), "broken": lambda path: path.symlink_to("nowhere"),
    "circle": lambda path: path.symlink_to(path.name), "large": _large,
}  # fmt: skip


@many(
    "no regular file|outside the checkpoint|cannot be opened|at most|not a safetensors file|no config.json|no tokenizer.json",
    **{f"{name}_{kind}": (name, make) for name in (*SIDE_FILES, INDEX, WHOLE) for kind, make in THINGS.items()},
)
def thing(folder: Path, good: Path, what: tuple[str, Any]) -> Path:
    name, make = what
    path = checkpoint(folder, good) / name
    path.unlink(missing_ok=True)
    make(path)
    return recipe(folder)


TEXTS: dict[str, bytes] = {
    "not_utf8": b"\xff\xfe{}", "zeros": b"\0" * 100, "empty": b"", "deep": b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
    "twice": b'{"a": 1, "a": 2}', "list": b"[]", "number": b"7", "digits": b'{"a": ' + b"9" * 5000 + b"}",
}  # fmt: skip


@many(
    "cannot be read as UTF-8|not readable as JSON|expected a JSON object|not a tokenizer",
    **{
        f"{name.split('.')[0]}_{kind}": (name, text)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json", INDEX)
        for kind, text in TEXTS.items()
    },
)
def content(folder: Path, good: Path, what: tuple[str, bytes]) -> Path:
    name, text = what
    (checkpoint(folder, good) / name).write_bytes(text)
    return recipe(folder)


ENTRY = '{"dtype":"F32","shape":[4],"data_offsets":[0,16]}'


@many(
    r"its header is damaged|has no data_offsets|has the dtype|has the shape|needs|no tensor|lies at bytes|follow the last",
    twice=f'{{"a":{ENTRY},"a":{ENTRY}}}', inner='{"a":{"dtype":"F32","shape":[4],"shape":[2],"data_offsets":[0,16]}}',
    null='{"a":null}', text='{"a":"x"}', no_shape='{"a":{"dtype":"F32","data_offsets":[0,16]}}',
    no_type='{"a":{"shape":[4],"data_offsets":[0,16]}}', three='{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8,16]}}',
    boolean='{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,16]}}', empty="{}",
    digits='{"a":{"dtype":"F32","shape":[' + "9" * 4000 + '],"data_offsets":[0,16]}}',
    rank='{"a":{"dtype":"F32","shape":[' + "1," * 5000 + '4],"data_offsets":[0,16]}}',
    other=f'{{"another.weight":{ENTRY}}}', markup=f'{{"[/b]":{ENTRY}}}', nul=f'{{"\\u0000":{ENTRY}}}',
)  # fmt: skip
def entry(folder: Path, good: Path, text: str) -> Path:
    (checkpoint(folder, good) / WHOLE).write_bytes(struct.pack("<Q", len(text)) + text.encode() + b"\0" * 16)
    return recipe(folder)


@many(
    "does not name shards|and an index of other files|is not a plain file name|does not name it|not in",
    empty={}, number={"a": 3}, nested={"a": {"b": "c"}}, other={"a": "other.safetensors"}, itself={"a": WHOLE},
    nul={"a": "x\0.safetensors"}, long={"a": "x" * 5000}, dot={"a": "."}, backslash={"a": "..\\canary"},
)  # fmt: skip
def index(folder: Path, good: Path, shards: dict[str, Any]) -> Path:
    (checkpoint(folder, good) / INDEX).write_text(json.dumps({"weight_map": shards}))
    return recipe(folder)


@many("and so has", one="a.safetensors", many="zzz.safetensors")
def two_shards(folder: Path, good: Path, name: str) -> Path:
    model = checkpoint(folder, good)
    content = (model / WHOLE).read_bytes()
    (model / WHOLE).rename(model / "model-1.safetensors")
    (model / name).write_bytes(content)
    return recipe(folder)


GROW = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 100}] * 6
BPE = {"type": "BPE", "vocab": {"a": 0}, "merges": []}


@many(
    "tokenizer.json: ",
    panic={"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, normalizer={"normalizer": {"type": "None"}},
    expression={"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}},
    unigram={"model": {"type": "Unigram", "vocab": [], "unk_id": 7}}, wordpiece={"model": {"type": "WordPiece", "vocab": {}}},
    no_model={"model": None}, merges={"model": BPE | {"merges": ["a b c"]}}, unknown={"model": BPE | {"unk_token": 7}},
    ids={"model": BPE | {"vocab": {"a": -1}}}, fractions={"model": BPE | {"vocab": {"a": 0.5}}}, added={"added_tokens": [7]},
    missing={"model": BPE | {"merges": [["x", "y"]]}},
    growth={"normalizer": {"type": "Sequence", "normalizers": GROW}},
)  # fmt: skip
def tokens(folder: Path, good: Path, part: dict[str, Any]) -> Path:
    (checkpoint(folder, good) / "tokenizer.json").write_text(json.dumps({"added_tokens": [], "model": BPE} | part))
    return recipe(folder)


@many(
    "chat template|chat_template",
    division="{{ 1 / 0 }}", recursion="{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", mapping={"a": "b"}, number=7,
    attribute="{{ messages.append.__globals__ }}", include="{% include '/etc/passwd' %}", extends="{% extends 'x' %}",
    silent="{% for a in range(99999) %}{% for b in range(99999) %}{% set c = a * b %}{% endfor %}{% endfor %}",
    power="{{ 9 ** (9 ** 9) }}", join="{{ ['x' * 9999999] * 99 | join }}",
    unknown="{% nonsense %}",
)  # fmt: skip
def templates(folder: Path, good: Path, text: Any) -> Path:
    edit(checkpoint(folder, good) / "tokenizer_config.json", chat_template=text)
    return recipe(folder)


@many("cannot be rendered: SecurityError", first="{{ ''.__class__.__mro__ }}")
def template_file(folder: Path, good: Path, text: str) -> Path:
    """The file is what counts, though tokenizer_config.json has a harmless one."""
    model = checkpoint(folder, good)
    edit(model / "tokenizer_config.json", chat_template="fine")
    (model / "chat_template.jinja").write_text(text)
    return recipe(folder)
