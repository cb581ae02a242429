"""A quantized linear layer whose codes and scales can be trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from lowbit.passes.quant.format import Blocks, exact_grid
from lowbit.passes.quant.quantized_weight import QuantizedWeight

REACH = {False: 0.49, True: 0.3}
"""How far from its code, in steps, a latent weight may begin. One that was rounded to nearest keeps its place. A calibrated
method moved weights for others' sake, often past a half, where the first update would flip them back."""


class TrainedLinear(torch.nn.Module):
    """y = x W^T + bias with W = (round(latent) - zero_point - shift) * scale * exp(stretch).

    The gradient passes straight through the rounding (Bengio et al., arXiv:1308.3432). Integer zero points stay as they are.

    Attributes:
        latent: float32 [N, K], in steps of a code, near the float weight's place and rounding to the code it begins with.
        stretch, shift: float32 [N, blocks]; shift is trained where zero points are free.
    """

    def __init__(self, weight: QuantizedWeight, blocks: Blocks, linear: Any) -> None:
        super().__init__()
        self.form, self.k = weight.form, weight.source.shape[1]
        self.bias = None if linear.bias is None else torch.nn.Parameter(linear.bias.detach(), requires_grad=False)
        self.latent, self.stretch = torch.nn.Parameter(torch.empty(0)), torch.nn.Parameter(torch.empty(0))
        self.shift = torch.nn.Parameter(torch.empty(0), requires_grad=self.form.free)
        self.settle(blocks)
        with torch.no_grad():
            place = linear.weight.float() / self._spread(self.scale) + self._spread(self.zero)
            reach = REACH[weight.method.calibrated]
            self.latent.copy_(torch.clamp(place, self.latent - reach, self.latent + reach))

    @property
    def grid(self) -> list[torch.nn.Parameter]:
        """What is trained beside the codes."""
        return [self.stretch, self.shift] if self.form.free else [self.stretch]

    def settle(self, blocks: Blocks) -> None:
        """Be exactly `blocks`: every latent weight is its code."""
        self.scale, self.zero = torch.from_numpy(blocks.scales.copy()), torch.from_numpy(blocks.zero_points.astype(np.float32))
        self.latent.data = torch.from_numpy(blocks.codes[:, : self.k].astype(np.float32))
        self.stretch.data, self.shift.data = torch.zeros_like(self.scale), torch.zeros_like(self.scale)

    def blocks(self) -> Blocks:
        """The codes as they are now; every scale and offset is exact in its dtype."""
        with torch.no_grad():
            codes = self._codes().numpy()
            scales, zeros = exact_grid((self.scale * self.stretch.exp()).numpy(), (self.zero + self.shift).numpy(), self.form)
        padded = np.repeat(np.clip(np.rint(zeros), 0, self.form.max_code).astype(np.uint8), self.form.block_size, 1)
        padded[:, : self.k] = codes
        return Blocks(padded, scales, zeros)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes = self._codes()
        if torch.is_grad_enabled() and self.latent.requires_grad:
            inside = self.latent.clamp(-0.49, self.form.max_code + 0.49)
            codes = inside + (codes - inside).detach()
        weight = (codes - self._spread(self.zero + self.shift)) * self._spread(self.scale * self.stretch.exp())
        return functional.linear(x, weight, self.bias)

    def _codes(self) -> torch.Tensor:
        return self.latent.detach().round().clamp(0, self.form.max_code)

    def _spread(self, values: torch.Tensor) -> torch.Tensor:
        """A value of each block for each of its weights."""
        return values.repeat_interleave(self.form.block_size, 1)[:, : self.k]
