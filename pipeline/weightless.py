"""optimum's exporter without weights: the few patches that let it trace a model of the meta device.

Each is here because the export fails without it (torch 2.13.0, optimum-onnx 0.1.0); the test
`tests/pipeline/test_weightless.py` fails loudly when either library changes beneath them.
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
