"""MNN's weight file: its bytes against a bit-by-bit packer, and the proof against every kind of damage."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from lowbit.pipeline.convert.mnn.converter import convert, read_json
from lowbit.pipeline.convert.mnn.llm import MnnLlm
from lowbit.pipeline.convert.mnn.weights import MnnLayer, lay_out, pack_msb
from lowbit.pipeline.errors import ConvertError, PipelineError
from lowbit.pipeline.onnx_io.reader import read_layers
from lowbit.pipeline.onnx_io.stored_layer import Region, StoredLayer
from tests import reference


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 8, 24, 37])
def test_msb_stream_equals_the_bit_by_bit_packer(bits: int, count: int) -> None:
    codes = np.random.default_rng(count).integers(0, 1 << bits, count).astype(np.uint8)
    np.testing.assert_array_equal(pack_msb(codes, bits), reference.pack_msb(codes, bits))


def test_bytes_of_one_three_bit_run() -> None:
    assert pack_msb(np.arange(8, dtype=np.uint8), 3).tobytes().hex() == "053977"  # 000 001 010 011 100 101 110 111


def stored(folder: Path, scales: np.ndarray, zeros: list[int] | None, n: int = 2, k: int = 16) -> StoredLayer:
    """A 4-bit layer of one block a row, its parts in one file."""
    codes = reference.pack_lsb(np.arange(n * k, dtype=np.uint8).reshape(n, k) % 16, 4).reshape(n, 1, k // 2)
    packed = None if zeros is None else np.array([[z] for z in zeros], np.uint8)
    parts = [codes, scales.reshape(n, 1)] + ([] if packed is None else [packed])
    file = folder / "data"
    file.write_bytes(b"".join(p.tobytes() for p in parts))
    offsets = np.cumsum([0, *(p.nbytes for p in parts)])
    regions = [Region(file, int(o), p.shape, p.dtype) for o, p in zip(offsets, parts, strict=False)]
    return StoredLayer("a.proj", 4, k, n, k, regions[0], regions[1], regions[2] if packed is not None else None, None, False)


def test_bytes_of_one_layer(tmp_path: Path) -> None:
    layer = MnnLayer(stored(tmp_path, np.array([0.5, 2.0], np.float16), [7, 8]), np.array([1.0, -1.0], np.float32), "fp16", 0)
    stream = io.BytesIO()
    layer.write(stream)
    data = stream.getvalue()
    header = b"\x02" + (2).to_bytes(2, "little") + (16).to_bytes(2, "little") + b"\x10" + bytes([*range(248, 256), *range(8)])
    codes = bytes.fromhex("0123456789abcdef" * 2)
    # offset = (8 - zero_point) * scale, then scale
    alpha = np.array([0.5, 0.5, 0.0, 2.0], np.float16).tobytes()
    assert data == header + codes + alpha + np.array([1.0, -1.0], np.float32).tobytes()
    assert layer.end == len(data)


def test_matrices_beyond_65535_rows_get_a_wide_header(tmp_path: Path) -> None:
    layer = MnnLayer(stored(tmp_path, np.array([0.5, 2.0], np.float16), None), None, "fp16", 7)
    assert not layer.wide
    wide = MnnLayer(stored(tmp_path, np.ones(70000, np.float16), None, n=70000), None, "fp16", 0)
    assert wide.wide
    assert wide.header[1:9] == (70000).to_bytes(4, "little") + (16).to_bytes(4, "little")
    assert [one.offset for one in lay_out([(layer.layer, None), (layer.layer, None)], "fp16")] == [0, layer.end - 7]


def test_scales_that_fp16_cannot_hold_are_refused(tmp_path: Path) -> None:
    layer = MnnLayer(stored(tmp_path, np.array([0.1, 2.0], np.float32), [8, 8]), None, "fp16", 0)
    with pytest.raises(ConvertError, match=r"a.proj: scales in rows 0 to 2 are not exact in fp16. .*scale_dtype: fp32"):
        layer.write(io.BytesIO())


def test_a_converter_that_fails_shows_its_last_lines(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"not a model")
    with pytest.raises(ConvertError, match="MNN's converter made no out.mnn"):
        convert("ONNX", tmp_path / "no.onnx", tmp_path / "out.mnn")


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(bytes(data))


def places(folder: Path, scratch: Path) -> dict[str, list[int]]:
    """`external` of every layer of the finished MNN file."""
    document = read_json(folder / "mnn" / "llm.mnn", scratch / "places.json")
    return {op["name"]: op["main"]["external"] for op in document["oplists"] if op["type"] == "Convolution"}


@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("codes", r"model.layers.1.mlp.up_proj: the code of weight \[0, \d\] differs"),
        ("last code", r"model.layers.1.mlp.up_proj: the code of weight \[127, 6[1-3]\] differs"),
        ("offset", "model.layers.1.mlp.up_proj: the offset of row 0, block 0 is"),
        ("scale", "model.layers.1.mlp.up_proj: the scale of row 0, block 0 is"),
        ("bias", "model.layers.1.self_attn.q_proj: its bias in"),
    ],
)
def test_one_flipped_bit_is_found_and_named(finished: Path, tmp_path: Path, part: str, message: str, bit: int) -> None:
    place = places(finished, tmp_path)
    offset, codes, _alpha, _, _ = place["model.layers.1.mlp.up_proj"]
    biased = place["model.layers.1.self_attn.q_proj"]
    at = {
        "codes": offset + 6 + 8,
        "last code": offset + codes - 1,
        "offset": offset + codes,
        "scale": offset + codes + 2,
        "bias": biased[0] + biased[1] + biased[2],
    }[part]
    flip(finished / "mnn" / "llm.mnn.weight", at, bit)
    with pytest.raises(ConvertError, match=message):
        MnnLlm.prove(finished / "onnx" / "model.onnx", finished / "mnn", tmp_path)


def test_a_flipped_bit_in_the_onnx_file_is_found(finished: Path, tmp_path: Path) -> None:
    layer = read_layers(finished / "onnx" / "model.onnx")["model.layers.0.mlp.gate_proj"]
    flip(layer.codes.file, layer.codes.offset + 5)
    with pytest.raises(ConvertError, match=r"model.layers.0.mlp.gate_proj: the code of weight \[0, "):
        MnnLlm.prove(finished / "onnx" / "model.onnx", finished / "mnn", tmp_path)


def test_float_zero_points_are_proven_too(results: Callable[..., Path], tmp_path: Path) -> None:
    quantize = "quantize_matmul: {bits: 2, block_size: 32, method: mse, zero_point: float}"
    folder = shutil.copytree(results("narrow_embedding", quantize), tmp_path / "result")
    file, name = folder / "onnx" / "model.onnx", "model.layers.0.mlp.gate_proj"
    layer = read_layers(file)[name]
    assert layer.offsets is not None
    flip(layer.offsets.file, layer.offsets.offset)
    with pytest.raises(ConvertError, match=f"{name}: the offset of row 0, block 0 is"):
        MnnLlm.prove(file, folder / "mnn", tmp_path)
    flip(layer.offsets.file, layer.offsets.offset)
    model = onnx.load(file, load_external_data=False)
    middle = next(t for t in model.graph.initializer if t.name == f"{name}.middle")
    middle.CopyFrom(onnx.numpy_helper.from_array(np.array(3, np.float32), middle.name))
    onnx.save(model, file)
    with pytest.raises(ConvertError, match=f"{name}: one file has zero points, the other has none"):
        MnnLlm.prove(file, folder / "mnn", tmp_path)


def test_a_changed_embedding_is_found(finished: Path, tmp_path: Path) -> None:
    flip(finished / "mnn" / "embeddings_bf16.bin", 1000)
    with pytest.raises(ConvertError, match="the embedding differs from 'model.embed_tokens.weight' in rows 0 to 320"):
        MnnLlm.prove(finished / "onnx" / "model.onnx", finished / "mnn", tmp_path)


def test_a_weight_file_cut_short_is_found(finished: Path, tmp_path: Path) -> None:
    path = finished / "mnn" / "llm.mnn.weight"
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ConvertError, match="its layers end at"):
        MnnLlm.prove(finished / "onnx" / "model.onnx", finished / "mnn", tmp_path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(PipelineError):
        MnnLlm.prove(finished / "onnx" / "model.onnx", finished / "mnn", tmp_path)


def test_a_quantized_embedding_is_proven_too(finished_embedding: Path, tmp_path: Path) -> None:
    assert MnnLlm.prove(finished_embedding / "onnx" / "model.onnx", finished_embedding / "mnn", tmp_path).layers == 16
    config = json.loads((finished_embedding / "mnn" / "llm_config.json").read_text())["tie_embeddings"]
    for at, what in ((100, "the code of weight"), (config["alpha_offset"] + 2, "the scale of row 0")):
        flip(finished_embedding / "mnn" / "embeddings_int4.bin", at)
        with pytest.raises(ConvertError, match=f"model.embed_tokens: {what}"):
            MnnLlm.prove(finished_embedding / "onnx" / "model.onnx", finished_embedding / "mnn", tmp_path)
        flip(finished_embedding / "mnn" / "embeddings_int4.bin", at)
