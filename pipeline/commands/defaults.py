"""What a user gets who names a model and a number of bits: the sections of a recipe, and why they are so."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from onnx import TensorProto

from lowbit.passes.base import READING, Pass
from lowbit.passes.registry import find_pass
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.checkpoint.onnx_model import OnnxModel
from lowbit.pipeline.convert.registry import find_target
from lowbit.pipeline.export.support import SUPPORTED, TASKS
from lowbit.pipeline.recipe.build import Entry
from lowbit.pipeline.recipe.targets import find_options, target_names

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
    """The sections but `model`; `passes` are kept as they are, and what the model and the target need comes before them.

    Raises:
        PipelineError: there is no such target.
    """
    task = task_of(checkpoint)
    targets = wanted.targets or (_target_for(task),)
    for target in targets:
        find_target(target)
    chosen = Chosen({} if task is None else {"export": {"task": task}})
    entries = _needed(checkpoint, task, targets, chosen.said)
    entries += _quantizing(wanted, task, targets) if passes is None else passes
    if passes is not None:
        entries = _once(entries, len(entries) - len(passes))
    calibrated = any(_options(entry).phases & READING for entry in entries)
    if calibrated:
        chosen.sections["calibrate"] = {"text": "library"}
        chosen.said.append(
            "layers are calibrated on docstrings of Python; for a model that reasons, set calibrate: text: generated"
        )
    chosen.sections |= {
        "passes": entries,
        "validate": _validate(checkpoint, chosen.said),
        "convert": [{"target": one} for one in targets],
    }
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


def _needed(checkpoint: Checkpoint, task: str | None, targets: tuple[str, ...], said: list[str]) -> list[Entry]:
    """Passes without which the model cannot be quantized, or the target not hold it."""
    entries: list[Entry] = ["remove_identities"]
    if task != "text-generation-with-past":
        return [*entries, "split_gemm"]
    table = next((weight for name, weight in checkpoint.weights.items() if TABLE.search(name)), None)
    halves = [target for target in targets if find_options(target).half_embedding]
    if table is not None and table.onnx_dtype == TensorProto.FLOAT and halves:
        entries.append({"narrow_embedding": {"dtype": "fp16"}})
        said.append(f"{halves[0]} holds no float32 embedding: it is narrowed to fp16, which is part of what is validated")
    else:
        entries.append("narrow_embedding")
    if any(FUSED.search(name) for name in checkpoint.weights):
        entries.append("split_projections")
        said.append("fused projections are split, so that each gets its own codes")
    return entries


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


def _once(entries: list[Entry], added: int) -> list[Entry]:
    """Without the first `added` entries that the user's own name as well."""
    own = {type(_options(entry)) for entry in entries[added:]}
    return [entry for number, entry in enumerate(entries) if number >= added or type(_options(entry)) not in own]


def _options(entry: Entry) -> Pass:
    if isinstance(entry, Pass):
        return entry
    name, options = (entry, {}) if isinstance(entry, str) else next(iter(entry.items()))
    return find_pass(name).model_validate(options or {}, strict=False)


def _validate(checkpoint: Checkpoint, said: list[str]) -> dict[str, int]:
    if sum(math.prod(weight.shape) for weight in checkpoint.weights.values()) < LARGE:
        return {"windows": 20}
    said.append("validated on 2 windows of 512 tokens, which take minutes each; set validate: windows for more")
    return {"windows": 2}
