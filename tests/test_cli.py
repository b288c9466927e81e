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

def deep():
    return nn.Sequential(*(Block(4, 4) for _ in range(24)))

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


def test_fit_compares_budgets_where_none_is_named(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["fit", "toy_models:words", "--input", "5,3:int64:11", "--memory", "1MB", "--optimizer", "adam"]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "Words, in dimension 0, within 976.6 KiB" in printed
    assert [line.split("  ")[0] for line in printed.splitlines()[4:]] == ["1.0", "none, chains reversed", "0.5", "0.0"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["activation_budget"] for one in found] == [1.0, None, 0.5, 0.0]
    assert all(one["bytes"] <= 1_000_000 < one["next_bytes"] for one in found)
    longer = ["--dim", "1", "--activation-budget", "0.0"]
    assert main([*arguments, *longer, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["dim"], found["activation_budget"]) == (1, 0.0)
    assert main([*arguments, *longer]) == 0
    assert f"Words: {found['size']} in dimension 1 is the most that fits" in capsys.readouterr().out


def test_budgets_that_nothing_fits_are_left_out(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["toy_models:deep", "--input", "1,1000,4", "--json"]
    needs = []
    for budget in ("0.0", "1.0"):
        assert main(["report", *arguments, "--activation-budget", budget]) == 0
        needs.append(json.loads(capsys.readouterr().out)["step"]["total"])
    assert main(["fit", *arguments, "--memory", str(needs[1] - 1)]) == 0
    budgets = [one["activation_budget"] for one in json.loads(capsys.readouterr().out)]
    assert budgets == [None, 0.5, 0.0]
    assert main(["fit", *arguments, "--memory", str(needs[0] // 2)]) == 2
    assert "is too little: a step of size 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "toy_models:build", "--memory", "1GB"], "needs --input"),
        (["fit", "toy_models:build", "--input", "5,4", "--memory", "much"], "memory='much' cannot be read"),
        (["fit", "toy_models:build", "--input", "5,4", "--memory", "1GB", "--dim", "2"], "dim=2: no input has"),
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
