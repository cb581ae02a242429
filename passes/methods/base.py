"""What a method is: frozen options that turn rows of weights into codes, scales and zero points."""

from __future__ import annotations

import numpy as np

from passes._blocks import BlockFormat, Blocks
from passes.base import Options


class Method(Options):
    """Chooses codes, scales and zero points for rows of one weight. All methods share this signature."""

    def quantize(self, rows: np.ndarray, form: BlockFormat) -> Blocks:
        """Quantize some rows of a weight, independently of all other rows.

        Args:
            rows: [rows, K], float32, float16 or bfloat16.
            form: bits, block size, symmetry and scale dtype; K need not be a multiple of the block.

        Returns:
            The codes; every scale and offset is exact in `form.scale_dtype`.
        """
        raise TypeError(f"{type(self).__name__} does not say how it quantizes")
