"""A decoder in torch, by transformers' own classes, its blocks filled one at a time from lazy weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from passes._weights import Weight
from pipeline.checkpoint import Checkpoint
from pipeline.transformers_config import transformers_config
from pipeline.weightless import empty_parameters


class TorchDecoder:
    """The float model, empty until a part of it is asked for.

    Args:
        parameters: every float weight by its name in the state dict.
    """

    def __init__(self, checkpoint: Checkpoint, parameters: dict[str, Weight]) -> None:
        self.parameters = parameters
        self.config = transformers_config(checkpoint)
        self.skeleton = self._skeleton()

    def _skeleton(self) -> Any:
        with empty_parameters():
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()
        return model.requires_grad_(False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of ids [windows, tokens] before the first block, float32 [windows, tokens, hidden]."""
        table = self.parameters["model.embed_tokens.weight"]
        rows = {i: table.rows(i, i + 1)[0].astype(np.float32) for i in torch.unique(ids).tolist()}
        return torch.from_numpy(np.stack([rows[i] for i in ids.reshape(-1).tolist()])).reshape(*ids.shape, -1)

    def block(self, number: int) -> Any:
        """One decoder block with its float weights."""
        fresh = self._skeleton().model.layers[number]
        return self._fill(fresh, f"model.layers.{number}.")

    def whole(self) -> Any:
        """The whole model with its float weights."""
        return self._fill(self._skeleton(), "")

    def run(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        """A block on hidden states [windows, tokens, hidden], each window from scratch."""
        positions = torch.arange(x.shape[1])[None]
        tables = self.skeleton.model.rotary_emb(x, positions)
        found = block(x, attention_mask=None, position_ids=positions, position_embeddings=tables)
        return found[0] if isinstance(found, tuple) else found

    def _fill(self, module: Any, prefix: str) -> Any:
        tied = getattr(self.config, "tie_word_embeddings", False)
        for name, _ in list(module.named_parameters(remove_duplicate=False)):
            source = self.parameters.get(prefix + name)
            if source is None and tied and name == "lm_head.weight":
                source = self.parameters["model.embed_tokens.weight"]
            if source is None:
                raise KeyError(f"the graph has no weight {prefix + name}")
            value = torch.from_numpy(source.load().astype(np.float32))
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
        return module
