"""config.json -> checked: types and ranges of every number that this program, transformers or an engine computes with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lowbit.pipeline.errors import CheckpointError
from lowbit.pipeline.limits import (
    MOST_CHANNELS,
    MOST_EXPERTS,
    MOST_HEADS,
    MOST_INNER,
    MOST_LABELS,
    MOST_LAYERS,
    MOST_PATCHES,
    MOST_PIXELS,
    MOST_POSITIONS,
    MOST_TOKENS,
    MOST_WIDTH,
)

Width = Annotated[int, Field(ge=1, le=MOST_WIDTH)]
Inner = Annotated[int, Field(ge=1, le=MOST_INNER)]
Heads = Annotated[int, Field(ge=1, le=MOST_HEADS)]
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Experts = Annotated[int, Field(ge=1, le=MOST_EXPERTS)]
Positions = Annotated[int, Field(ge=1, le=MOST_POSITIONS)]
Pixels = Annotated[int, Field(ge=1, le=MOST_PIXELS)]
Channels = Annotated[int, Field(ge=1, le=MOST_CHANNELS)]
Labels = Annotated[int, Field(ge=1, le=MOST_LABELS)]
Named = Annotated[dict[str, Any], Field(max_length=MOST_LABELS)]
PerLayer = Annotated[list[Any], Field(max_length=MOST_LAYERS)]
Size = Annotated[float, Field(gt=0, le=1e12)]
Factor = Annotated[float, Field(ge=-1e12, le=1e12)]
Share = Annotated[float, Field(ge=0, le=1)]
Token = Annotated[int, Field(ge=-1, lt=MOST_TOKENS)]
"""Some families write -1 for a token that they have not."""


class ModelConfig(BaseModel):
    """What the supported families read; anything else in the file is left to transformers.

    Where null is not allowed, the value stands for an option that is not there; nobody reads it.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    model_type: Annotated[str, Field(pattern=r"^[\w.-]*$", max_length=100)] = ""
    architectures: list[str] | None = None
    hidden_size: Width = 1
    dim: Width = 1
    head_dim: Width | None = None
    pooler_output_size: Width | None = None
    intermediate_size: Inner = 1
    hidden_dim: Inner = 1
    moe_intermediate_size: Inner = 1
    num_hidden_layers: Layers = 1
    n_layers: Layers = 1
    num_attention_heads: Heads = 1
    num_key_value_heads: Heads | None = None
    n_heads: Heads = 1
    num_experts: Experts = 1
    num_experts_per_tok: Experts = 1
    decoder_sparse_step: Layers | None = None
    vocab_size: Annotated[int, Field(ge=1, le=MOST_TOKENS)] = 1
    type_vocab_size: Labels = 1
    max_position_embeddings: Positions = 1
    original_max_position_embeddings: Positions | None = None
    sliding_window: Annotated[int, Field(ge=0, le=MOST_POSITIONS)] | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=MOST_LAYERS)] | None = None
    layer_types: PerLayer | None = None
    no_rope_layers: PerLayer | None = None
    no_rope_layer_interval: Layers | None = None
    mlp_only_layers: PerLayer | None = None
    image_size: Pixels = 1
    patch_size: Pixels = 1
    encoder_stride: Pixels | None = None
    num_channels: Channels = 1
    num_labels: Labels | None = None
    id2label: Named | None = None
    label2id: Named | None = None
    bos_token_id: Token | list[Token] | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    activation: str | None = None
    rms_norm_eps: Share | None = None
    layer_norm_eps: Share | None = None
    rope_theta: Size | None = None
    rope_local_base_freq: Size | None = None
    rope_scaling: dict[str, Factor | str | bool | list[Factor] | None] | None = None
    partial_rotary_factor: Share = 1
    query_pre_attn_scalar: Size | None = None
    attn_logit_softcapping: Size | None = None
    final_logit_softcapping: Size | None = None
    attention_multiplier: Factor | None = None
    embedding_multiplier: Factor | None = None
    residual_multiplier: Factor | None = None
    logits_scaling: Size | None = None
    tie_word_embeddings: bool | None = None
    use_sliding_window: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    norm_topk_prob: bool | None = None

    @model_validator(mode="after")
    def _patches(self) -> ModelConfig:
        if self.image_size and self.patch_size and (self.image_size // self.patch_size) ** 2 > MOST_PATCHES:
            size = f"an image_size of {self.image_size} in patches of {self.patch_size}"
            raise ValueError(f"{size} is more than {MOST_PATCHES:,} patches")
        return self


def checked_config(config: dict[str, Any], where: Path) -> dict[str, Any]:
    """The configuration as it is written, if a model can be of such numbers.

    Raises:
        CheckpointError: an option is of the wrong type, or beyond what anybody has made.
    """
    try:
        ModelConfig.model_validate(config)
    except ValidationError as error:
        raise CheckpointError(f"{where}: {_sentence(error, config)}. Fetch the file again.") from error
    return config


def _sentence(error: ValidationError, config: dict[str, Any]) -> str:
    first = error.errors(include_url=False)[0]
    if not first["loc"]:
        return first["msg"].removeprefix("Value error, ")
    name = str(first["loc"][0])
    schema = ModelConfig.model_json_schema()["properties"][name]
    limits = schema.get("anyOf", [schema])[0]
    wanted = f"a number from {limits['minimum']} to {limits['maximum']:,}" if {"minimum", "maximum"} <= limits.keys() else None
    value = json.dumps(config[name])
    return f"{name} is {value[:80]}; expected {wanted}" if wanted else f"{name} is {value[:80]}: {first['msg'].lower()}"
