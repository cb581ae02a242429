"""What strangers name reaches a terminal as it is written: no markup, no escape, no traceback."""

from __future__ import annotations

import io

import pytest
from rich.console import Console, RenderableType
from rich.table import Table

from lowbit.pipeline.cli.options import show
from lowbit.pipeline.commands.doctor import findings_table
from lowbit.pipeline.commands.sweep import read_axes
from lowbit.pipeline.errors import RecipeError, visible
from lowbit.pipeline.report.bits_map import bits_map
from lowbit.pipeline.report.comparison import COLUMNS, comparison_table
from lowbit.pipeline.report.plain_text import plain, plain_title
from lowbit.pipeline.report.progress import Steps

NAME = "[/b][red]\x1b[2J\u202e"
SHOWN = "[/b][red]\\x1b[2J\\u202e"


def rendered(thing: RenderableType) -> str:
    console = Console(file=io.StringIO(), width=300, force_terminal=True, color_system=None)
    console.print(thing)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_text_is_shown_as_it_is() -> None:
    assert visible("a\tb\nc é 模型") == "a\tb\nc é 模型"
    assert visible("\0\x1b\x9b\ud800") == "\\x00\\x1b\\x9b\\ud800"
    assert rendered(plain(NAME)) == f"{SHOWN}\n"
    assert SHOWN in rendered(Table("column" * 9, title=plain_title(NAME)))


def test_tables_show_names_as_they_are() -> None:
    row = (NAME, *[""] * (len(COLUMNS) - 1))
    tables = [comparison_table([row]), findings_table([("x", False, NAME)])]
    tables.append(bits_map({f"model.layers.{i}.{NAME}": (3 + i, 64) for i in range(2)}))  # type: ignore[arg-type]
    for table in tables:
        assert SHOWN in rendered(table)


def test_lines_show_names_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=io.StringIO(), width=300)
    with Steps(console).step("write", {}) as (record, _):
        record.notes = (NAME,)
    assert SHOWN in console.file.getvalue()  # type: ignore[attr-defined]
    show(NAME)
    assert capsys.readouterr().out == f"{SHOWN}\n"


@pytest.mark.parametrize("value", ["[", "!!int~abc", "9" * 5000, "&a", "{a: ", "\x1b"])
def test_values_that_are_varied_are_read_as_in_a_recipe(value: str) -> None:
    with pytest.raises(RecipeError, match="--vary validate.windows:"):
        read_axes([f"validate.windows={value}".replace(" ", "")])
