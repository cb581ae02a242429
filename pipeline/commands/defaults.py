"""What a user gets who names a model and a number of bits: the sections of a recipe, and why they are so."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx import TensorProto
from pydantic import ValidationError

from lowbit.passes.base import READING, Pass
from lowbit.passes.registry import find_pass, word_of
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.onnx_model import OnnxModel
from lowbit.pipeline.convert.registry import find_target
from lowbit.pipeline.export.support import SUPPORTED, TASKS
from lowbit.pipeline.recipe.build import Entry
from lowbit.pipeline.recipe.sections import Calibrate, Validate
from lowbit.pipeline.recipe.targets import find_options, target_names
from lowbit.pipeline.validate.dataset import positions

LARGE = 1_000_000_000
"""Weights of a model that takes minutes to validate on a window of text."""
HEAD_BITS = 4
"""Bits of the output layer at least: it reads every token, and is a small part of a large model."""
TABLE = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings)\.weight$")
FUSED = re.compile(r"\.(qkv_proj|gate_up_proj)\.weight$")


@dataclass(frozen=True)
class Wanted:
    """What is asked for beside the model.

    Attributes:
        targets: none of them chooses one that takes the model.
        fit: a budget in place of bits, such as `3.2GB`.
    """

    bits: int | None = None
    block_size: int = 64
    method: str = "mse"
    targets: tuple[str, ...] = ()
    fit: str | None = None


@dataclass
class Chosen:
    """Sections of a recipe, and a sentence for each choice that nobody asked for."""

    sections: dict[str, Any]
    said: list[str] = field(default_factory=list)


def choose(checkpoint: Checkpoint, wanted: Wanted, passes: Sequence[Entry] | None = None) -> Chosen:
    """The sections but `model`; what the model and the targets need is put around `passes`, which are kept as they are.

    Raises:
        PipelineError: there is no such target.
    """
    task = task_of(checkpoint)
    targets = wanted.targets or (_target_for(task),)
    for target in targets:
        find_target(target)  # or a sentence
    chosen = Chosen({} if task is None else {"export": {"task": task}})
    given = _quantizing(wanted, task, targets) if passes is None else list(passes)
    named = set(map(_name, given))
    needed = _needed(checkpoint, task, targets)
    before, after = ([added for added in part if _name(added[0]) not in named] for part in needed)
    chosen.said += [why for _, why in (*before, *after) if why]
    entries = [*(entry for entry, _ in before), *given, *(entry for entry, _ in after)]
    if any(map(_reads_text, entries)):
        chosen.sections["calibrate"] = {"text": "library", **_window(checkpoint, Calibrate().window)}
        chosen.said.append("layers are calibrated on docstrings of Python; for models that reason, text: generated is better")
    hand_offs = [{"target": target, "compare": "quick"} for target in targets]
    chosen.sections |= {"passes": entries, "validate": _validate(checkpoint, chosen.said), "convert": hand_offs}
    return chosen


def task_of(checkpoint: Checkpoint) -> str | None:
    """What the model is exported for; None where there is nothing to export.

    A checkpoint says it by the name of its class: `BertForSequenceClassification`.
    """
    if isinstance(checkpoint, OnnxModel):
        return None
    tasks = TASKS[SUPPORTED.get(str(checkpoint.config.get("model_type")), "decoder")]
    name = str(next(iter(checkpoint.config.get("architectures") or []), ""))
    endings = {"text-classification": "ForSequenceClassification", "image-classification": "ForImageClassification"}
    return next((task for task in tasks if task in endings and name.endswith(endings[task])), tasks[0])


def _target_for(task: str | None) -> str:
    decoder = task == "text-generation-with-past"
    return next(name for name in target_names() if find_target(name).decoders == decoder)


Added = list[tuple[Entry, str]]
"""Passes, each with a sentence why; "" where it changes no value."""


def _needed(checkpoint: Checkpoint, task: str | None, targets: tuple[str, ...]) -> tuple[Added, Added]:
    """What the model cannot be quantized or a target not hold it without: before its weights are quantized, and after."""
    if task != "text-generation-with-past":
        return [("remove_identities", ""), ("split_gemm", "")], []
    before: Added = [("remove_identities", "")]
    after: Added = []
    table = next((weight for name, weight in checkpoint.weights.items() if TABLE.search(name)), None)
    halves = [target for target in targets if find_options(target).half_embedding]
    if table is not None and table.onnx_dtype == TensorProto.FLOAT and halves:
        why = f"{halves[0]} holds no float32 embedding: it is narrowed to fp16, which is part of what is validated"
        # after: an output layer that shares the table has a name of its own only while it does
        after.append(({"narrow_embedding": {"dtype": "fp16"}}, why))
    else:
        before.append(("narrow_embedding", ""))
    if any(FUSED.search(name) for name in checkpoint.weights):
        before.append(("split_projections", "fused projections are split, so that each gets its own codes"))
    return before, after


def _quantizing(wanted: Wanted, task: str | None, targets: tuple[str, ...]) -> list[Entry]:
    decoder = task == "text-generation-with-past"
    free = decoder and all(find_options(target).free_offsets for target in targets)
    if wanted.fit is not None:
        offsets = {"zero_point": "float"} if free else {}
        budget = {"fit": wanted.fit, "bits": [2, 3, 4], "block_sizes": [64, 128], "method": wanted.method, **offsets}
        return [{"allocate_bits": {**budget, "sensitivity": "fisher" if decoder else "weight_mse"}}]
    bits = wanted.bits or HEAD_BITS
    offsets = {"zero_point": "float"} if free and bits < 4 else {}
    rest = {"bits": bits, "block_size": wanted.block_size, "method": wanted.method, **offsets}
    if not decoder or bits >= HEAD_BITS:
        return [{"quantize_matmul": rest}]
    return [{"quantize_matmul": {**rest, "bits": HEAD_BITS, "include": ["lm_head"]}}, {"quantize_matmul": rest}]


def _name(entry: Entry) -> str:
    return word_of(entry) if isinstance(entry, Pass) else entry if isinstance(entry, str) else next(iter(entry))


def _reads_text(entry: Entry) -> bool:
    """Whether a pass looks at inputs of layers; what is wrong with its options is said when the recipe is checked."""
    options = {} if isinstance(entry, Pass | str) else next(iter(entry.values())) or {}
    try:
        made = entry if isinstance(entry, Pass) else find_pass(_name(entry)).model_validate_json(json.dumps(options))
    except (KeyError, ValidationError):
        return False
    return bool(made.phases & READING)


def _validate(checkpoint: Checkpoint, said: list[str]) -> dict[str, int]:
    window = _window(checkpoint, Validate().window)
    if sum(math.prod(weight.shape) for weight in checkpoint.weights.values()) < LARGE:
        return {"windows": 4, **window}
    said.append("validated on 2 windows of 512 tokens, which take minutes each; set validate: windows for more")
    return {"windows": 2, **window}


def _window(checkpoint: Checkpoint, usual: int) -> dict[str, int]:
    """The option `window`, where the model has fewer positions than usual."""
    longest = positions(checkpoint)
    return {} if longest is None or usual <= longest else {"window": longest}
