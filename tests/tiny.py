"""Tiny random checkpoints, made on the spot by transformers itself."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

VOCABULARY = 320
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
}

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Llama 3's RoPE scaling, at the size of a tiny model."""

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "norm_topk_prob": True},
    ),
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "smollm3": ("SmolLM3", {"pad_token_id": 0, "num_hidden_layers": 4}),
    "phi3": ("Phi3", {"pad_token_id": 0, "sliding_window": None}),
    "gemma": ("Gemma", {"head_dim": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4}),
    "gemma3": ("Gemma3Text", {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 4, "num_hidden_layers": 6}),
    "olmo2": ("Olmo2", {"pad_token_id": 0}),
    "granite": ("Granite", {"embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
    "bert": ("Bert", {}),
    "roberta": ("Roberta", {"pad_token_id": 1}),
    "xlm-roberta": ("XLMRoberta", {"pad_token_id": 1}),
    "distilbert": ("DistilBert", {"dim": 64, "hidden_dim": 128, "n_layers": 2, "n_heads": 4}),
    "vit": ("ViT", {"image_size": 32, "patch_size": 8}),
}
ENCODERS = ("bert", "roberta", "xlm-roberta", "distilbert", "vit")
"""What transformers calls a kind, and what its configuration needs beside SHAPE."""
TASKS = {"text-generation-with-past": "ForCausalLM", "feature-extraction": "Model"}
TASKS |= {"text-classification": "ForSequenceClassification", "image-classification": "ForImageClassification"}
"""optimum's tasks, and how transformers' classes for them end."""


def task_of(kind: str) -> str:
    """What a kind is made for unless a test says otherwise."""
    return "feature-extraction" if kind in ENCODERS else "text-generation-with-past"


def make_checkpoint(
    folder: Path, kind: str = "qwen2", dtype: str = "bfloat16", shards: bool = False, task: str | None = None, **config: Any
) -> Path:
    """Write a random checkpoint of a kind of KINDS with a byte-level tokenizer to `folder`."""
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    name, extra = KINDS[kind]
    shape = {k: v for k, v in SHAPE.items() if kind not in ENCODERS or k != "num_key_value_heads"}
    make_config = getattr(transformers, f"{name}Config")
    make_model = getattr(transformers, f"{name.removesuffix('Text')}{TASKS[task or task_of(kind)]}")
    model = make_model(make_config(**{**shape, **extra, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # norms and biases that are not all ones and zeros, and weights large enough to matter
            parameter.normal_(
                1.0 if "norm" in name.lower() and "bias" not in name else 0.0, 0.1 if parameter.ndim == 1 else 0.3
            )
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(["<|end|>", *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}), "utf-8")
    return folder


def recipe_text(
    model: Path | str, *passes: str, convert: str = "convert: {}", validate: str = "", task: str = "text-generation-with-past"
) -> str:
    """A recipe with the given entries under `passes:`."""
    entries = "\n".join(f"  - {entry}" for entry in passes)
    export = "" if task == "text-generation-with-past" else f"\nexport: {{task: {task}}}"
    return f"model: {model}{export}\npasses:\n{entries}\n{validate}\n{convert}\n"


def write_sparse_flagship(folder: Path) -> None:
    """The configuration and weight headers of DeepSeek-R1-Distill-Qwen-7B (its model card) over a sparse file."""
    hidden, inner, key, vocabulary, layers = 3584, 18944, 512, 152064, 28
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden, "intermediate_size": inner,
        "num_hidden_layers": layers, "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": vocabulary,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-6, "rope_theta": 10000, "tie_word_embeddings": False,
        "use_sliding_window": False, "sliding_window": 4096, "torch_dtype": "bfloat16", "hidden_act": "silu",
    }  # fmt: skip
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [vocabulary, hidden]}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        for name, rows, columns in (("q", hidden, hidden), ("k", key, hidden), ("v", key, hidden), ("o", hidden, hidden)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = [rows, columns]
            if name != "o":
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = [rows]
        shapes[f"{prefix}.mlp.gate_proj.weight"] = shapes[f"{prefix}.mlp.up_proj.weight"] = [inner, hidden]
        shapes[f"{prefix}.mlp.down_proj.weight"] = [hidden, inner]
        shapes[f"{prefix}.input_layernorm.weight"] = shapes[f"{prefix}.post_attention_layernorm.weight"] = [hidden]
    shapes |= {"model.norm.weight": [hidden], "lm_head.weight": [vocabulary, hidden]}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
