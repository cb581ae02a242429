"""The folder is the registry: names of passes and methods, their classes, plug-ins, and the sentences for mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lowbit.passes as passes
import lowbit.passes.methods as methods
import lowbit.passes.trust as trust
from lowbit.passes.base import OptionError, Options
from lowbit.passes.methods.hqq import Hqq
from lowbit.passes.methods.mse import Mse
from lowbit.passes.methods.refine import Refine
from lowbit.passes.quantize_matmul import QuantizeMatmul
from lowbit.passes.registry import find_method, find_pass, names_in, word_of
from tests.graphs import graph, random, run, weights_of

NEGATE = """
import onnx_graphsurgeon as gs
from lowbit.passes.base import Outcome, Pass

class Negate(Pass):
    factor: float = -1.0

    def apply(self, graph: gs.Graph) -> Outcome:
        for node in graph.nodes:
            node.op = "Neg"
        return Outcome(tuple(node.name for node in graph.nodes))
"""
COARSE = """
import numpy as np
from lowbit.passes.methods.rtn import Rtn
from lowbit.passes.quant.format import BlockFormat, Blocks
from lowbit.passes.quant.hessian import Hessian
from lowbit.passes.quant.method import Method

class Coarse(Method):
    step: int = 2

    def quantize(self, rows: np.ndarray, form: BlockFormat, hessian: Hessian | None = None) -> Blocks:
        blocks = Rtn().quantize(rows, form)
        blocks.codes[...] -= blocks.codes % self.step
        return blocks
"""


@pytest.fixture
def plug_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `toys` outside of this project, with a pass and a method."""
    (tmp_path / "toys").mkdir()
    (tmp_path / "toys" / "negate.py").write_text(NEGATE, "utf-8")
    (tmp_path / "toys" / "coarse.py").write_text(COARSE, "utf-8")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(trust, "_folders", {})
    trust.trust_folders(tmp_path)
    for name in ("toys", "toys.negate", "toys.coarse"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def test_a_pass_from_elsewhere_is_found_by_its_dotted_name(plug_ins: None) -> None:
    kind = find_pass("toys.negate")
    assert word_of(kind()) == "toys.negate"
    g = graph("g (float[2] x) => (float[2] y) { y = Abs (x) }")
    assert kind().apply(g).rewritten == (g.nodes[0].name,)
    np.testing.assert_array_equal(run(g, x=np.ones(2, np.float32))[0], [-1, -1])
    with pytest.raises(OptionError, match="Negate: unknown option 'facto'. Did you mean 'factor'?"):
        kind(facto=2.0)


@pytest.mark.parametrize("choice", ["toys.coarse", {"toys.coarse": {"step": 2}}])
def test_a_method_from_elsewhere_is_an_option_of_a_pass(plug_ins: None, choice: Any) -> None:
    g = graph("g (float[2, 32] x) => (float[2, n] y) { y = MatMul (x, a__weight) }", a__weight=random(32, 6))
    options = QuantizeMatmul(bits=4, block_size=16, method=choice)
    assert options.model_dump(mode="json")["method"] == "toys.coarse"
    options.apply(g)
    weight = weights_of(g)["a"]
    assert weight.made_by == "toys.coarse"
    assert not (weight.parts["codes"].load() & 0x11).any(), "its codes are even"


def test_what_holds_no_pass_is_refused() -> None:
    assert find_pass("lowbit.passes.quantize_matmul") is QuantizeMatmul
    with pytest.raises(KeyError, match="there is no pass module 'no.such'"):
        find_pass("no.such")
    with pytest.raises(KeyError, match="must define one pass, it defines 0"):
        find_pass("lowbit.passes.graph.names")


def test_every_class_is_called_like_its_file_and_offered_by_its_folder() -> None:
    for package, find in ((passes, find_pass), (methods, find_method)):
        kinds = [find(word) for word in names_in(package)]  # type: ignore[operator]
        assert {kind.__name__ for kind in kinds} <= set(dir(package))
        assert [getattr(package, kind.__name__) for kind in kinds] == kinds
    assert [word_of(Mse()), word_of(QuantizeMatmul(bits=4))] == ["mse", "quantize_matmul"]
    with pytest.raises(ImportError, match="cannot import name 'Quantizer'"):
        exec("from lowbit.passes import Quantizer")


def test_a_class_is_imported_when_it_is_asked_for() -> None:
    """In a fresh interpreter, whichever module comes first."""
    code = "import sys; from lowbit.passes import SplitGemm; assert 'lowbit.passes.rotate_residual' not in sys.modules"
    for first in ("lowbit.passes", "lowbit.passes.registry", "lowbit.passes.methods"):
        subprocess.run([sys.executable, "-c", f"import {first}; {code}"], check=True)


@pytest.mark.parametrize(
    ("given", "method"),
    [
        ("mse", Mse()),
        ({"mse": {}}, Mse()),
        (Hqq(p=0.5), Hqq(p=0.5)),
        ({"hqq": {"iterations": 30}}, Hqq(iterations=30)),
        ({"refine": {"after": Mse(), "sweeps": 2}}, Refine(after=Mse(), sweeps=2)),
    ],
)
def test_a_method_may_be_given_in_python_as_in_a_recipe(given: Any, method: Options) -> None:
    options = QuantizeMatmul(bits=3, method=given, include=["*.q_proj", "lm_head"])
    assert options.method == method
    assert options.include == ("*.q_proj", "lm_head")
    assert QuantizeMatmul.model_validate_json(options.model_dump_json()) == options


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits": 5}, "QuantizeMatmul: bits is 5; expected 2, 3, 4 or 8."),
        ({"bits": "3"}, "QuantizeMatmul: bits is '3'; expected 2, 3, 4 or 8."),
        ({"bit": 3}, "QuantizeMatmul: unknown option 'bit'. Did you mean 'bits'?"),
        ({}, "QuantizeMatmul: the option 'bits' is required."),
        ({"bits": 3, "include": "lm_head"}, "QuantizeMatmul: include is 'lm_head'; expected a list."),
        ({"bits": 3, "method": "gtpq"}, "QuantizeMatmul: method: there is no method 'gtpq'. Did you mean 'gptq'?"),
        (
            {"bits": 3, "method": {"hqq": {"iteration": 1}}},
            "method: Hqq: unknown option 'iteration'. Did you mean 'iterations'?",
        ),
        ({"bits": 3, "method": {"hqq": 3}}, "method: a method is a name such as rtn, or one name with its options"),
        (
            {"bits": 3, "zero_point": "float", "symmetric": True},
            "QuantizeMatmul: zero_point: float and symmetric: true contradict",
        ),
    ],
)
def test_a_mistake_in_python_reads_as_in_a_recipe(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError) as error:
        QuantizeMatmul(**options)
    assert sentence in str(error.value)
    assert "pydantic" not in str(error.value)


def test_a_mistake_in_a_methods_options_is_named() -> None:
    with pytest.raises(OptionError, match=r"Hqq: p is 'big'; expected a valid number\."):
        Hqq(p="big")
