"""Channel scales: folding any of them changes nothing in float, and the search finds those of least output error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lowbit.passes.base import PassError
from lowbit.passes.fold_channel_scales import FoldChannelScales
from lowbit.passes.graph.quantized_ops import quantized_matmuls
from lowbit.passes.methods.awq import search_scale
from lowbit.passes.methods.gptq import Gptq
from lowbit.passes.methods.mse import Mse
from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import BlockFormat
from lowbit.passes.quant.method import Method
from lowbit.passes.quant.quantized_weight import QuantizedWeight
from lowbit.passes.quant.scaled_weight import ChannelScale, ScaledWeight, read_scale
from lowbit.passes.quant.weights import ArrayWeight
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.pipeline.runtime.session import decoder_feeds, open_reference
from lowbit.pipeline.runtime.torch_decoder import TorchDecoder
from tests.conftest import Exported
from tests.graphs import graph, random

IDS = np.random.default_rng(0).integers(1, 300, (2, 9))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("qwen2", {}),
        ("qwen3", {"num_key_value_heads": 1}),
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "dtype": "float32"}),
    ],
)
def test_any_scales_leave_the_float_model_as_it_was(exported: Exported, kind: str, options: dict[str, Any]) -> None:
    import torch

    checkpoint, whole = exported(kind, **options)
    expected = open_reference(whole).run(["logits"], decoder_feeds(whole, IDS))[0]
    _, folded = exported(kind, **options)
    QuantizeMatmul(bits=4, block_size=16).apply(folded)
    outcome = FoldChannelScales().apply(folded)
    assert len(outcome.rewritten) == 15
    assert not outcome.skipped
    rng = np.random.default_rng(1)
    scales = {id(s): s for _, w in quantized_matmuls(folded) if (s := read_scale(w.source)) is not None}
    assert len(scales) == 4 * 2 + 1, "q, k and v share one, so do gate and up"
    for scale in scales.values():
        scale.values = np.exp(rng.standard_normal(scale.size)).astype(np.float32)
    with torch.no_grad():
        found = TorchDecoder.of_graph(checkpoint, folded).whole()(torch.from_numpy(IDS)).logits.numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_what_cannot_be_folded_is_left_alone_with_a_reason(exported: Exported) -> None:
    _, whole = exported("qwen2")
    QuantizeMatmul(bits=4, block_size=16, exclude=("*.0.self_attn.q_proj", "*.1.self_attn.v_proj")).apply(whole)
    outcome = FoldChannelScales().apply(whole)
    assert outcome.skipped == {
        "model.layers.0.self_attn.k_proj": "something else reads the same input",
        "model.layers.0.self_attn.v_proj": "something else reads the same input",
        "model.layers.1.self_attn.q_proj": "something else reads the same input",
        "model.layers.1.self_attn.k_proj": "something else reads the same input",
        "model.layers.1.self_attn.o_proj": "its input is made by no norm, and by no layer that scales pass through",
    }
    alone = graph("g (float[m, 32] x) => (float[m, 32] y) { y = MatMul (x, a__weight) }", a__weight=random(32, 32))
    with pytest.raises(PassError, match="no quantized MatMul found; put quantize_matmul before it"):
        FoldChannelScales().apply(alone)
    QuantizeMatmul(bits=4, block_size=16).apply(alone)
    with pytest.raises(PassError, match="nothing to fold: a: its input is made by no norm"):
        FoldChannelScales().apply(alone)


def test_a_scale_that_nobody_searched_is_refused() -> None:
    with pytest.raises(PassError, match="model.norm: its channels were not looked at; add `calibrate:`"):
        ScaledWeight(ArrayWeight(random(4, 4)), read=ChannelScale("model.norm", 4, 20)).load()


def test_rows_and_columns_are_scaled() -> None:
    w, read, written = random(6, 8), ChannelScale("r", 4, 20, head_dim=2, repeats=2), ChannelScale("w", 6, 20)
    read.values, written.values = np.array([1, 2, 4, 8], np.float32), np.arange(1, 7, dtype=np.float32)
    scaled = ScaledWeight(ArrayWeight(w), read, written)
    np.testing.assert_allclose(scaled.rows(2, 5), (w * [1, 2, 1, 2, 4, 8, 4, 8] / written.values[:, None])[2:5], rtol=1e-6)
    np.testing.assert_allclose(ScaledWeight(ArrayWeight(w[:, 0]), written=written).load(), w[:, 0] / written.values, rtol=1e-6)
    assert read.gather(np.array([1, 2, 3, 4, 5, 6, 7, 8], np.float32)).tolist() == [2, 3, 6, 7]
    assert read_scale(ScaledWeight(scaled, written=written)) is read
    assert read_scale(ArrayWeight(w)) is None


@pytest.mark.parametrize("method", [Mse(), Gptq()], ids=["mse", "gptq"])
@pytest.mark.parametrize("zero_point", ["integer", "float"])
def test_the_search_equals_reference(method: Method, zero_point: Any) -> None:
    """Ratio by ratio, the outputs written out; a few loud channels make it worth while."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 64)).astype(np.float32)
    x[:, ::16] *= 20
    form = BlockFormat(3, 32, False, "fp16", zero_point)
    layers = [QuantizedWeight(n, ArrayWeight(random(24, 64, seed=i)), form, method) for i, n in enumerate("ab")]
    found = search_scale(x, layers, ChannelScale("x", 64, 10))
    plain = Rtn() if method.calibrated else method
    errors = []
    for i in range(10):
        s = np.abs(x).mean(0) ** np.float32(i / 10)
        s /= np.sqrt(s.max() * s.min())
        errors.append((sum(_error(x, layer, s, plain) for layer in layers), s))
    best, expected = min(errors, key=lambda one: one[0])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert best < 0.7 * errors[0][0]


def _error(x: np.ndarray, layer: QuantizedWeight, s: np.ndarray, method: Method) -> float:
    w = layer.source.load().astype(np.float64)
    made = method.quantize((w * s).astype(np.float32), layer.form).dequantize(64).astype(np.float64) / s
    return float(((x @ (w - made).T) ** 2).sum())
