"""The map of bits by layer and kind."""

from __future__ import annotations

import io

from rich.console import Console

from lowbit.pipeline.report.bits_map import bits_map


def test_layers_that_are_alike_need_no_map() -> None:
    forms = {f"model.layers.{i}.mlp.{kind}": (3, 64) for i in range(3) for kind in ("up_proj", "down_proj")}
    assert bits_map(forms | {"lm_head": (4, 64)}) is None
    assert bits_map({"lm_head": (4, 64)}) is None


def test_every_weight_has_its_place() -> None:
    forms = {f"model.layers.{i}.mlp.up_proj": (2 + i % 2, 64) for i in range(11)}
    table = bits_map({"lm_head": (8, 128), **forms, "model.layers.10.mlp.down_proj": (4, 32)})
    assert table is not None
    stream = io.StringIO()
    Console(file=stream, width=80).print(table)
    lines = [line.strip("│┃ ").replace("│", "|").split() for line in stream.getvalue().splitlines()]
    assert ["10", "|", "|", "2/64", "|", "4/32"] in lines, "after 9, not after 1"
    assert ["0", "|", "|", "2/64", "|"] in lines or ["0", "|", "|", "2/64"] in lines
    assert any("8/128" in line for line in lines)
