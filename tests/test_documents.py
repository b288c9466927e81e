"""The documents: their code runs, their links and pictures lead somewhere, and the site names what there is."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import Net
from sharded import process_group
from torch import nn

import mfx

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCED = re.compile(r"^```(\w*)(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`[^`\n]*`")
NEEDS = {"index": ("torchvision",), "trainer": ("transformers", "accelerate")}
SLOW = {"compile", "index", "trainer"}


def code_of(page: Path) -> list[str]:
    """The page's blocks of Python, each at its line of the page; there is no mark for one that is not to be run."""
    text = page.read_text(encoding="utf-8")
    found = [block for block in FENCED.finditer(text) if block[1] == "python"]
    assert all(not block[2].strip() for block in found), f"{page.name}: words behind ```python"
    return ["\n" * text.count("\n", 0, block.start(3)) + block[3] for block in found]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


RUN = [
    pytest.param(page, marks=[pytest.mark.slow] if page.stem in SLOW else [], id=name_of(page))
    for page in PAGES
    if code_of(page)
]


@pytest.mark.parametrize("page", RUN)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in NEEDS.get(page.stem, ()):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    # What a page may take for granted: a residual model with blocks, its input, and the steps of a training.
    given: dict[str, Any] = {"model": Net().float(), "x": torch.randn(2, 4), "training_steps": 6}
    names = {"torch": torch, "nn": nn, "mfx": mfx, **given}
    with process_group(tmp_path) if page.stem == "sharding" else contextlib.nullcontext():
        for code in code_of(page):
            exec(compile(code, name_of(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_pictures_lead_somewhere(page: Path):
    text = INLINE.sub("", FENCED.sub("", page.read_text(encoding="utf-8")))
    for picture, name in re.findall(r"(!?)\[[^]]*\]\(([^)#\s]+)", text):
        if not name.startswith("https://"):
            assert (page.parent / name).exists(), name
            assert not picture or (page.parent / name).stat().st_size < 150_000, name


def test_the_site_names_files_that_exist_and_every_page():
    named = re.findall(r"^ +- [^:]+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    for name in named:
        assert (DOCS / name).exists() or (ROOT / name).exists(), name
    assert {page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")} <= set(named)


def test_the_reference_has_every_public_name_once():
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    assert sorted(["__version__", *re.findall(r"^::: mfx\.(\w+)$", text, re.MULTILINE)]) == sorted(mfx.__all__)
    assert "`mfx.__version__`" in text
