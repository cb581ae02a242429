"""Write a checkpoint of a real shape with random bf16 weights: `python -m tests.scale.checkpoint DIR [--shape NAME]`.

Weights are heavy-tailed, with a few outlier channels, as those of language models are. Shards are written one after
the other under a temporary name; a run that was stopped goes on with the first missing one. No more than a few
megabytes are held. The same DIR and shape always give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

PYDOCS = Path(__file__).parents[1] / "models" / "qwen2-pydocs"
ROWS_BYTES = 16 << 20

SHAPES: dict[str, dict[str, Any]] = {
    # config.json of deepseek-ai/DeepSeek-R1-Distill-Qwen-7B
    "7b": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 131072, "rope_theta": 10000,
    },
    # one layer of it
    "7b-layer": {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 1, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 131072, "rope_theta": 10000,
    },
    # config.json of Qwen/Qwen2.5-0.5B, untied as the 7B is
    "0.5b": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    },
    # for tests
    "small": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 4096, "max_position_embeddings": 1024, "rope_theta": 10000.0,
    },
}  # fmt: skip


def write_checkpoint(folder: Path, shape: str, shards: int = 4) -> None:
    """Write the checkpoint, or what is missing of it."""
    config = SHAPES[shape]
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(config)
    total = sum(2 * math.prod(dims) for dims in tensors.values())
    plan: list[list[str]] = [[] for _ in range(shards)]
    written = 0
    for name, dims in tensors.items():
        plan[min(shards - 1, written * shards // total)].append(name)
        written += 2 * math.prod(dims)
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for file, names in zip(files, plan, strict=True):
        if not (folder / file).exists():
            _write_shard(folder / file, {name: tensors[name] for name in names})
    index = {
        "metadata": {"total_size": total},
        "weight_map": {n: f for f, names in zip(files, plan, strict=True) for n in names},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(PYDOCS / name, folder / name)
    rest = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "use_sliding_window": False, "torch_dtype": "bfloat16", "bos_token_id": 0,
        "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config | rest, indent=1), "utf-8")  # last: the folder is whole


def _tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Qwen2 checkpoint in its usual order."""
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    key = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        for part, rows in (("q", hidden), ("k", key), ("v", key)):
            found[f"{layer}.self_attn.{part}_proj.weight"] = (rows, hidden)
            found[f"{layer}.self_attn.{part}_proj.bias"] = (rows,)
        found[f"{layer}.self_attn.o_proj.weight"] = (hidden, hidden)
        found[f"{layer}.mlp.gate_proj.weight"] = (inner, hidden)
        found[f"{layer}.mlp.up_proj.weight"] = (inner, hidden)
        found[f"{layer}.mlp.down_proj.weight"] = (hidden, inner)
        found[f"{layer}.input_layernorm.weight"] = (hidden,)
        found[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
    return found | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]]) -> None:
    header, end = {}, 0
    for name, dims in tensors.items():
        begin, end = end, end + 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as stream, ThreadPoolExecutor(2) as pool:
        stream.write(struct.pack("<Q", len(text)) + text)
        jobs = [(name, dims, start) for name, dims in tensors.items() for start in range(0, dims[0], _rows(dims))]
        for first in range(0, len(jobs), 8):  # eight pieces at a time in memory
            for piece in pool.map(lambda job: _random_rows(*job), jobs[first : first + 8]):
                stream.write(piece.data)
    temporary.rename(path)


def _rows(dims: tuple[int, ...]) -> int:
    return max(1, ROWS_BYTES // (4 * math.prod(dims[1:])))


def _random_rows(name: str, dims: tuple[int, ...], start: int) -> np.ndarray:
    """Some rows of a tensor as bf16 bit patterns, uint16, seeded by name and row."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    rng = np.random.default_rng([seed, start])
    shape = (min(_rows(dims), dims[0] - start), *dims[1:])
    values = rng.standard_normal(shape, np.float32)
    if len(dims) == 1:
        values = 1 + 0.1 * values if "norm" in name else 0.1 * values
    else:
        values *= 1 + np.float32(0.15) * values * values  # tails like Student's t
        outliers = np.random.default_rng([seed]).choice(dims[1], max(1, dims[1] // 500), replace=False)
        values[:, outliers] *= 6
        values *= np.float32(0.6 / math.sqrt(dims[1]))
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="7b")
    arguments = parser.parse_args()
    write_checkpoint(arguments.folder, arguments.shape)
