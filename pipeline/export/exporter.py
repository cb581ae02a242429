"""`export:` a checkpoint -> ONNX, through optimum, without loading a weight.

The graph is traced from a model on the meta device; weights are graph inputs that carry the checkpoint's
names, and `bind` ties them to the .safetensors files they stay in.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from pathlib import Path

from lowbit.pipeline.checkpoint.config import transformers_config
from lowbit.pipeline.checkpoint.huggingface import Checkpoint
from lowbit.pipeline.errors import ExportError
from lowbit.pipeline.export.support import VISION, check_config
from lowbit.pipeline.recipe.sections import Export

MODELS = {
    "text-generation-with-past": "AutoModelForCausalLM", "feature-extraction": "AutoModel",
    "image-classification": "AutoModelForImageClassification", "text-classification": "AutoModelForSequenceClassification",
}  # fmt: skip
"""transformers' class for each task."""


def export_graph(checkpoint: Checkpoint, options: Export, path: Path) -> None:
    """Write the graph of `checkpoint` to `path`: weights are inputs named as in the checkpoint.

    Raises:
        ExportError: the architecture is not supported, or transformers would read the config wrongly.
    """
    check_config(checkpoint, options)
    # heavy, and only an export needs them
    import torch
    import transformers
    from optimum.exporters.onnx import convert
    from optimum.exporters.tasks import TasksManager

    from lowbit.pipeline.export.torch_patches import dense_experts, empty_parameters, weightless_export

    decoder = options.task == "text-generation-with-past"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            try:
                config = transformers_config(checkpoint)
                # convolutions of the meta device cannot be traced; models of images are small
                with contextlib.nullcontext() if config.model_type in VISION else empty_parameters():
                    model = getattr(transformers, MODELS[options.task]).from_config(config, dtype=torch.float32).eval()
            except Exception as error:  # whatever transformers raises for numbers that make no model
                raise _unfit(checkpoint, "build the model", error) from error
            build = TasksManager.get_exporter_config_constructor(
                "onnx", model=model, task=options.task, library_name="transformers"
            )
            past = {"use_past": True, "use_past_in_inputs": True} if decoder else {}
            with weightless_export(), dense_experts() if config.model_type == "qwen3_moe" else contextlib.nullcontext():
                try:
                    convert.export(model, build(model.config, **past), path, opset=options.opset, do_constant_folding=False)
                except Exception as error:  # whatever torch raises for numbers that do not fit one another
                    raise _unfit(checkpoint, "trace the model", error) from error
        finally:
            logging.disable(logging.NOTSET)


def _unfit(checkpoint: Checkpoint, verb: str, error: Exception) -> ExportError:
    what = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return ExportError(f"{checkpoint.folder / 'config.json'}: transformers cannot {verb} that it describes: {what}")
