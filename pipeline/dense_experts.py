"""Mixtures of experts for the exporter: every expert computed for every token, those not chosen weighted by zero.

Which experts a token chooses depends on its data, which a graph without loops over experts cannot follow. The sum is the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch


@contextlib.contextmanager
def dense_experts() -> Iterator[None]:
    """While this lasts, Qwen3-MoE's blocks compute all of their experts."""
    from optimum.exporters.onnx import model_patcher

    # optimum replaces the loop too, by one over all experts that still picks their tokens by data
    with mock.patch.object(model_patcher, "qwen3_moe_forward_patched", _dense):
        yield


def _dense(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' forward without its loop: hidden_states [batch, tokens, hidden] -> the same shape, router logits."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = self.gate(rows)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    top, chosen = torch.topk(weights, self.top_k, dim=-1)
    if self.norm_topk_prob:
        top = top / top.sum(dim=-1, keepdim=True)
    shares = [((chosen == i).to(top.dtype) * top).sum(dim=-1, keepdim=True) for i in range(self.num_experts)]
    total = sum(expert(rows) * share.to(rows.dtype) for expert, share in zip(self.experts, shares, strict=True))
    return total.reshape(hidden_states.shape), logits
