"""How long a run takes, by rates measured once with `make bench shape=7b` and `make bench-accuracy shape=7b-layer`.

On 2 cores at 2.8 GHz and a disk of 500 MB/s. Training (`finetune_blocks`) is not counted.
"""

from __future__ import annotations

from lowbit.passes.registry import find_method
from lowbit.pipeline.recipe.recipe import Recipe

SECONDS_BEFORE = 25.0
"""Export, rehearsal and start, which hardly depend on the model's size."""
QUANTIZE = {"rtn": 8.0, "mse": 12.0, "hqq": 75.0}
"""Nanoseconds a weight, read, quantized and written twice (results and store), by method; another counts as mse."""
CALIBRATED = {"weighted_mse": 60.0, "gptq": 150.0, "refine": 1380.0, "signround": 30000.0}
"""Nanoseconds a weight that a calibrated method takes in a layer of 7B; another counts as gptq. signround's is arithmetic (200
products with the second moments), the others were measured."""
LOOK, WRITE = 0.16, 0.05
"""Nanoseconds a weight and token: both models and the second moments; the float model writing its own text."""
RECALL = 2.0
"""Nanoseconds a weight that is in the store already."""
HAND_OFF = 16.0
"""Nanoseconds a weight for lowering and its check, the engine's files, and the proof; measured for MNN."""
LOAD_FLOAT, LOAD_QUANTIZED = 10.0, 3.0
"""Nanoseconds a weight to load the float model, and the quantized one, block by block."""
PER_TOKEN = 0.013
"""Nanoseconds a weight and token in onnxruntime, either model."""


def expected_seconds(recipe: Recipe, weights: list[tuple[str, int, bool]]) -> float:
    """About how long a run of `recipe` takes on the machine named above.

    Args:
        weights: method, count and whether it is in the store already, of each quantized weight.
    """
    total = sum(count for _, count, _ in weights)
    nanoseconds = sum(count * (RECALL if known else QUANTIZE.get(method, QUANTIZE["mse"])) for method, count, known in weights)
    if recipe.calibrate is not None:
        tokens = recipe.calibrate.windows * recipe.calibrate.window
        look = LOOK + (WRITE if recipe.calibrate.text == "generated" else 0)
        calibrated = [(method, count) for method, count, known in weights if not known and find_method(method).calibrated]
        nanoseconds += sum(count * (CALIBRATED.get(method, CALIBRATED["gptq"]) + look * tokens) for method, count in calibrated)
    if recipe.validate is not None:
        tokens = recipe.validate.windows * recipe.validate.window
        nanoseconds += total * (LOAD_FLOAT + 2 * LOAD_QUANTIZED + 3 * PER_TOKEN * tokens)
    nanoseconds += len(recipe.convert) * total * HAND_OFF
    return SECONDS_BEFORE + nanoseconds / 1e9
