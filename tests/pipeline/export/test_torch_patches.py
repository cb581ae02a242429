"""The patches under the weightless export: if torch or optimum changes beneath them, this says so."""

from __future__ import annotations

import inspect

import torch
from optimum.exporters.onnx import convert
from torch.onnx._internal.torchscript_exporter import utils  # noqa: PLC2701  (what is patched is private)

from lowbit.pipeline.export.torch_patches import weightless_export


def test_what_is_patched_is_still_used() -> None:
    assert "torch._C" in repr(utils._C)
    source = inspect.getsource(utils)
    assert "_C._jit_pass_onnx_deduplicate_initializers(" in source, "torch moved the pass that compares initializers"
    exporter = inspect.getsource(convert)
    assert "onnx_export(" in exporter or "torch.onnx.export" in exporter or "from torch.onnx import export" in exporter


def test_patches_are_gone_afterwards() -> None:
    before = (torch.onnx.export, torch.autocast, utils._C)
    with weightless_export():
        assert torch.onnx.export is not before[0]
        assert torch.autocast("meta").__class__.__name__ == "nullcontext"
        assert torch.autocast("cpu").__class__.__name__ == "autocast"
        assert utils._C._jit_pass_onnx_deduplicate_initializers(None, {"a": 1}, False) == {"a": 1}
    assert (torch.onnx.export, torch.autocast, utils._C) == before
