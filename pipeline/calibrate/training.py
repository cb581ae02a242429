"""Linear layers of trained codes and a loss -> layers of less loss: the optimizer's loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch

from lowbit.passes.finetune_blocks import FinetuneBlocks
from lowbit.pipeline.calibrate.fake_quant_linear import TrainedLinear

BETAS = (0.9, 0.99)
"""Adam's: gradients of rounding change fast, so their squares are forgotten sooner than usual."""
WARM_UP, LAST = 0.05, 0.05
"""Share of the steps in which the learning rate rises, and what share of it a cosine leaves at the end."""


def train(
    layers: Iterable[TrainedLinear],
    loss: Callable[[torch.Tensor], torch.Tensor],
    windows: int,
    epochs: int,
    options: FinetuneBlocks,
    progress: Callable[[float], None],
) -> None:
    """Change the codes and scales of `layers` so that `loss` falls.

    Args:
        loss: of some windows, given their numbers int64 [batch].
        windows: how many there are.
        progress: gets the share done.
    """
    optimizer = _optimizer(list(layers), options)
    signs = options.optimizer != "adam"
    steps = epochs * -(-windows // options.batch)
    rate = falling_rate if signs else warm_rate
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step / steps))
    for step, batch in enumerate(_batches(windows, epochs, options), 1):
        optimizer.zero_grad()
        torch.autograd.backward(loss(batch))
        if signs:
            _keep_signs(optimizer)
        optimizer.step()
        schedule.step()
        progress(step / steps)


def _optimizer(layers: list[TrainedLinear], options: FinetuneBlocks) -> torch.optim.Optimizer:
    groups = (
        {"params": [layer.latent for layer in layers], "lr": options.learning_rate},
        {"params": [parameter for layer in layers for parameter in layer.grid], "lr": options.scale_learning_rate},
    )
    return torch.optim.Adam(groups, betas=BETAS) if options.optimizer == "adam" else torch.optim.SGD(groups)


def _batches(windows: int, epochs: int, options: FinetuneBlocks) -> Iterator[torch.Tensor]:
    """Numbers of windows, in another order in each epoch."""
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(epochs):
        yield from torch.split(torch.randperm(windows, generator=generator), options.batch)


def _keep_signs(optimizer: torch.optim.Optimizer) -> None:
    """Let every gradient be its sign."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.sign_()


def warm_rate(done: float) -> float:
    """Adam's learning rate, of its highest, when a share of the steps is done: it rises, then falls as a cosine."""
    return done / WARM_UP if done < WARM_UP else LAST + (1 - LAST) * (1 + math.cos(math.pi * done)) / 2


def falling_rate(done: float) -> float:
    """The learning rate of signs, of its highest, when a share of the steps is done: it falls to nothing as a line."""
    return 1 - done
