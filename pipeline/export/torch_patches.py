"""optimum's exporter without weights: the few patches that let it trace a model of the meta device.

Each is here because the export fails without it (torch 2.13.0, optimum-onnx 0.1.0); the test
`tests/pipeline/export/test_torch_patches.py` fails loudly when either library changes beneath them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.onnx._internal.torchscript_exporter import utils as torchscript_utils
from torch.utils._pytree import tree_map


@contextlib.contextmanager
def weightless_export() -> Iterator[None]:
    """While this lasts, torch.onnx.export accepts meta tensors and writes weights as graph inputs."""
    with (
        mock.patch.object(torch.onnx, "export", _export(torch.onnx.export)),
        mock.patch.object(torch, "autocast", _autocast(torch.autocast)),
        mock.patch.object(torchscript_utils, "_C", _PassesWithoutDeduplication()),
    ):
        yield


def _export(original: Any) -> Any:
    def export(model: Any, args: Any, **options: Any) -> Any:
        # inputs must live where the model does, and a meta tensor has no value to store or fold
        device = next(model.parameters()).device
        args = tree_map(lambda t: t.to(device) if isinstance(t, torch.Tensor) else t, args)
        options |= {"export_params": False, "do_constant_folding": False, "dynamo": False}
        return original(model, args, **options)

    return export


def _autocast(original: Any) -> Any:
    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        # rotary embeddings switch autocast off for their device; for "meta" that raises
        return contextlib.nullcontext() if device_type == "meta" else original(device_type, *args, **options)

    return autocast


class _PassesWithoutDeduplication:
    """torch._C, whose pass that merges equal initializers compares values, which meta tensors lack."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch._C, name)

    @staticmethod
    def _jit_pass_onnx_deduplicate_initializers(graph: Any, params: Any, is_train: bool) -> Any:
        return params


@contextlib.contextmanager
def empty_parameters() -> Iterator[None]:
    """While this lasts, modules are made with parameters that have no values, and buffers that have theirs.

    Buffers (rotary frequencies, scales of embeddings) are not in the checkpoint; the exporter bakes them into the graph.
    """
    register = torch.nn.Module.register_parameter

    def empty(self: torch.nn.Module, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":  # a tied one stays the very same
            parameter = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(self, name, parameter)

    with mock.patch.object(torch.nn.Module, "register_parameter", empty):
        yield


@contextlib.contextmanager
def dense_experts() -> Iterator[None]:
    """While this lasts, Qwen3-MoE's blocks compute all of their experts."""
    from optimum.exporters.onnx import model_patcher

    # optimum replaces the loop too, by one over all experts that still picks their tokens by data
    with mock.patch.object(model_patcher, "qwen3_moe_forward_patched", _dense):
        yield


def _dense(self: Any, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Transformers' forward without its loop: hidden_states [batch, tokens, hidden] -> the same shape, router logits."""
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    logits = self.gate(rows)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
    top, chosen = torch.topk(weights, self.top_k, dim=-1)
    if self.norm_topk_prob:
        top = top / top.sum(dim=-1, keepdim=True)
    shares = [((chosen == i).to(top.dtype) * top).sum(dim=-1, keepdim=True) for i in range(self.num_experts)]
    total = sum(expert(rows) * share.to(rows.dtype) for expert, share in zip(self.experts, shares, strict=True))
    return total.reshape(hidden_states.shape), logits
