"""Lazy weights -> a decoder in torch, by transformers' own classes, its blocks filled one at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from transformers import AutoModelForCausalLM

from lowbit.passes.graph.quantized_ops import quantized_weight
from lowbit.passes.quant.weights import Weight, weight_of
from lowbit.pipeline.checkpoint.config import transformers_config
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.export.torch_patches import empty_parameters


class TorchDecoder:
    """The float model, empty until a part of it is asked for.

    Args:
        parameters: every float weight by its name in the state dict.
    """

    def __init__(self, checkpoint: Checkpoint, parameters: dict[str, Weight]) -> None:
        self.parameters = parameters
        self.config = transformers_config(checkpoint)
        self.skeleton = self._skeleton()

    @classmethod
    def of_graph(cls, checkpoint: Checkpoint, graph: gs.Graph) -> TorchDecoder:
        """The model with the float weights of a graph, also of those that are to be quantized."""
        tensors = {t.name: weight_of(t) for t in graph.tensors().values() if isinstance(t, gs.Constant)}
        quantized = {w.name + ".weight": w.source for node in graph.nodes if (w := quantized_weight(node)) is not None}
        return cls(checkpoint, tensors | quantized)

    def _skeleton(self) -> Any:
        with empty_parameters():
            model = AutoModelForCausalLM.from_config(self.config, dtype=torch.float32).eval()
        return model.requires_grad_(False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Hidden states of ids [windows, tokens] before the first block, float32 [windows, tokens, hidden]."""
        table = self.parameters["model.embed_tokens.weight"]
        rows = {i: table.rows(i, i + 1)[0].astype(np.float32) for i in torch.unique(ids).tolist()}
        states = torch.from_numpy(np.stack([rows[i] for i in ids.reshape(-1).tolist()])).reshape(*ids.shape, -1)
        return states * self._embedding_scale()

    def _embedding_scale(self) -> float:
        """What a model multiplies its embeddings by before the first block: Granite's says so, Gemma's is known."""
        if self.config.model_type.startswith("gemma"):
            return float(self.config.hidden_size) ** 0.5
        return float(getattr(self.config, "embedding_multiplier", 1.0))

    def block(self, number: int) -> Any:
        """One decoder block with its float weights."""
        fresh = self._skeleton().model.layers[number]
        return self._fill(fresh, f"model.layers.{number}.")

    def norm(self) -> Any:
        """What comes after the last block and before the output layer."""
        return self._fill(self._skeleton().model.norm, "model.norm.")

    @property
    def head_weight(self) -> Weight:
        """The output layer's, [vocabulary, hidden]."""
        return self._parameter("lm_head.weight")

    def whole(self) -> Any:
        """The whole model with its float weights."""
        return self._fill(self._skeleton(), "")

    def run(self, block: Any, x: torch.Tensor) -> torch.Tensor:
        """A block on hidden states [windows, tokens, hidden], each window from scratch."""
        positions = torch.arange(x.shape[1])[None]
        tables = self.skeleton.model.rotary_emb(x, positions)
        output = block(x, attention_mask=None, position_ids=positions, position_embeddings=tables)
        return output[0] if isinstance(output, tuple) else output

    def _fill(self, module: Any, prefix: str) -> Any:
        for name, _ in list(module.named_parameters(remove_duplicate=False)):
            value = torch.from_numpy(self._parameter(prefix + name).load().astype(np.float32))
            parent, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
        return module

    def _parameter(self, name: str) -> Weight:
        source = self.parameters.get(name)
        if source is None and name == "lm_head.weight" and getattr(self.config, "tie_word_embeddings", False):
            source = self.parameters["model.embed_tokens.weight"]
        if source is None:
            raise KeyError(f"the graph has no weight {name}")
        return source
