"""What a method is: frozen options that turn rows of weights into codes, scales and zero points."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy.typing as npt

from lowbit.passes.base import Options, PassError
from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.hessian import Hessian


class Method(Options):
    """Chooses codes, scales and zero points for rows of one weight. All methods share this signature."""

    calibrated: ClassVar[bool] = False
    """Whether the method needs the layer's inputs: a recipe that uses it says in `calibrate:` where they come from."""

    def quantize(self, rows: npt.NDArray[Any], form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        """Quantize some rows of a weight, independently of all other rows.

        Args:
            rows: [rows, K], float32, float16 or bfloat16.
            form: bits, block size, symmetry and scale dtype; K need not be a multiple of the block.
            hessian: second moments of the layer's inputs, given to calibrated methods.

        Returns:
            The codes; every scale and offset is exact in `form.scale_dtype`.
        """
        raise TypeError(f"{type(self).__name__} does not say how it quantizes")


def needed(hessian: Hessian | None) -> Hessian:
    """What a calibrated method was given.

    Raises:
        PassError: nothing; the layer's inputs were not looked at.
    """
    if hessian is None:
        raise PassError("a calibrated method got no inputs of the layer to look at; add `calibrate:` to the recipe.")
    return hessian
