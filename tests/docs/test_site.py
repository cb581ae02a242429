"""The site is built without a warning, needs nothing from elsewhere, and its reference has every option."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mkdocs.commands.build import build
from mkdocs.config import load_config

from lowbit import passes
from lowbit.passes import methods
from lowbit.passes.registry import find_method, find_pass, names_in
from lowbit.pipeline.recipe.sections import SECTIONS
from lowbit.pipeline.recipe.targets import find_options, target_names

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(folder)))
    return folder


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe)[^>]*\ssrc=\"?(?:https?:)?//|<link[^>]*\shref=\"?(?:https?:)?//|url\([\"']?https?://"
    )
    files = [file for kind in ("*.html", "*.css") for file in site.rglob(kind)]
    assert len(files) > 20
    assert [file.name for file in files if loaded.search(file.read_text("utf-8"))] == []


def test_the_reference_has_every_option(site: Path) -> None:
    text = (site / "reference" / "recipe.html").read_text("utf-8")
    kinds = {
        **{f"sections-{name}": kind for name, kind in SECTIONS.items()},
        **{f"sections-convert-{name}": find_options(name) for name in target_names()},
        **{f"passes-{name}": find_pass(name) for name in names_in(passes)},
        **{f"methods-{name}": find_method(name) for name in names_in(methods)},
    }
    for anchor, kind in kinds.items():
        _, found, after = text.partition(f'id="{anchor}"')
        assert found, anchor
        described = after.partition("<h3")[0]
        assert [name for name in kind.model_fields if f"<td><code>{name}</code></td>" not in described] == [], anchor


def test_sources_of_the_generator_are_no_pages(site: Path) -> None:
    assert list(site.rglob("*.py")) == []
