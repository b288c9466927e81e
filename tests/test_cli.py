"""The command line, as a shell runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mfx
from mfx.cli import main

MODEL = """
import torch
from torch import nn

class Block(nn.Linear):
    def forward(self, x):
        return x + super().forward(torch.tanh(x))

def build():
    return nn.Sequential(Block(4, 4), Block(4, 4), nn.Linear(4, 2))

def words():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body = nn.Embedding(11, 4), build()
        def forward(self, ids):
            return self.body(self.embedding(ids))
    return Words()

def nothing():
    return 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "toy_models.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("toy_models", None)
    return tmp_path


def test_report_prints_the_table_that_str_gives(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "toy_models:build", "--input", "5,4"]) == 0
    printed = capsys.readouterr().out
    assert "Sequential: 2 of 2 residual adds become momentum steps" in printed
    assert "kept for backward" in printed


def test_report_as_json(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "toy_models:words", "--input", "5,3:int64:11", "--gamma", "0.5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["blocks"]] == ["body.0", "body.1"]
    assert found["chains"][0]["gammas"] == [0.5, 0.5]


def test_verify_runs_the_model_and_says_ok(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "toy_models:build", "--input", "5,4", "--dtype", "float64", "--exclude", "1"]) == 0
    printed = capsys.readouterr().out
    assert "gradient error" in printed
    assert "ok" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "toy_models:build", "--gamma", "1.5"], "gamma=1.5"),
        (["report", "toy_models"], "neither torchvision:NAME nor package.module:callable"),
        (["report", "toy_models:missing"], "cannot make a model of toy_models:missing"),
        (["report", "toy_models:nothing"], "gave int, not a torch.nn.Module"),
        (["report", "torchvision:resnet19"], "torchvision has no model 'resnet19'"),
        (["report", "toy_models:build", "--input", "a,b"], "--input 'a,b' is not SHAPE"),
        (["report", "toy_models:build", "--input", "5,3"], "example_inputs do not fit the model"),
        (["report", "toy_models:build", "--dtype", "float31"], "'float31' is not a dtype"),
        (["report", "toy_models:build", "--exclude", "nine"], "exclude='nine' matches no block"),
        (["verify", "toy_models:build"], "needs --input"),
    ],
)
def test_what_cannot_be_is_one_line_and_status_two(
    models: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("mfx: ")
    assert message in shown.err


def test_the_module_runs_as_a_program(models: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mfx", "report", "toy_models:build"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "2 of 2 residual adds" in done.stdout


def test_the_version_is_that_of_the_package() -> None:
    assert mfx.__version__.count(".") == 2
