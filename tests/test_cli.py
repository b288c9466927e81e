"""The command line, as a shell runs it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mfx
from mfx.cli import main
from mfx.cli.progress import progress
from mfx.options import make_options

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

def sized(depth):
    return nn.Sequential(*(Block(4, 4) for _ in range(depth)))

def shifted():
    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = build()
        def forward(self, x):
            x = self.body(x)
            return x * 2 + x.roll(1, -1) * 3
    return Shifted()

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
        (["report", "toy_models"], "none of torchvision:NAME, timm:NAME"),
        (["report", "toy_models:missing"], "cannot make a model of toy_models:missing"),
        (["report", "toy_models:nothing"], "gave int, not a torch.nn.Module"),
        (["report", "torchvision:resnet19"], "torchvision has no model 'resnet19'"),
        (["report", "toy_models:build", "--input", "a,b"], "--input 'a,b' is not SHAPE"),
        (["report", "toy_models:build", "--input", "5,3"], "example_inputs do not fit the model"),
        (["report", "toy_models:build", "--dtype", "float31"], "'float31' is not a dtype"),
        (["report", "toy_models:build", "--exclude", "nine"], "exclude='nine' matches no block"),
        (["verify", "toy_models:build"], "needs --input"),
        (["report", "toy_models:build", "--output", "none/found.html"], "there is no folder 'none'"),
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


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"mfx {mfx.__version__}, torch ")


def test_every_option_of_the_python_call_is_an_argument() -> None:
    for command in ("report", "verify", "fit"):
        done = subprocess.run(
            [sys.executable, "-m", "mfx", command, "--help"], capture_output=True, text=True, check=False
        )
        for name in inspect.signature(make_options).parameters:
            assert f"--{name.replace('_', '-')}" in done.stdout


def test_gammas_by_pattern_and_options_reach_the_plan(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["report", "toy_models:build", "--gamma", "0=0.5", "--gamma", "*=0.7", "--input", "5,4", "--json"]
    assert main([*arguments, "--state-dtype", "float64", "--tolerance", "1e-3"]) == 0
    (chain,) = json.loads(capsys.readouterr().out)["chains"]
    assert chain["gammas"] == [0.5, 0.7]
    assert chain["state_dtype"] == "float64"
    assert chain["tolerance"] == 1e-3
    assert main([*arguments, "--no-reversible", "--velocity", "first"]) == 0
    (chain,) = json.loads(capsys.readouterr().out)["chains"]
    assert chain["gammas"] == [0.0, 0.7], "the first block acts like the plain one"
    assert chain["stored"]


def test_inputs_with_names_are_keyword_arguments(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "toy_models:words", "--input", "ids=5,3:int64:11"]) == 0
    assert "verdict" in capsys.readouterr().out
    assert main(["report", "toy_models:words", "--input", "idss=5,3:int64:11"]) == 2
    assert "the model takes ids" in capsys.readouterr().err


def test_what_makes_the_model_gets_what_is_set(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "toy_models:sized", "--set", "depth=5", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["blocks"]) == 5


def test_a_model_of_timm(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("timm")
    assert main(["report", "timm:vit_tiny_patch16_224", "--set", "depth=3", "--input", "1,3,224,224", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["blocks"]) == 6
    assert main(["report", "timm:vit_none"]) == 2
    assert "timm has no model 'vit_none'" in capsys.readouterr().err


def test_a_configuration_of_transformers_and_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    words = ["--input", "input_ids=2,8:int64:50", "--input", "use_cache=False", "--eval"]
    typed = [part for name, value in sizes.items() for part in ("--set", f"{name}={value}")]
    named = ["hf:LlamaConfig", *typed, "--set", "num_key_value_heads=2", *words]
    assert main(["report", *named, "--json"]) == 0
    assert [row["status"] for row in json.loads(capsys.readouterr().out)["blocks"]] == ["momentum"] * 4
    transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=50)).save_pretrained(tmp_path)
    folder = [f"hf:{tmp_path}", *words[:2], "--eval"]
    assert main(["verify", *folder]) == 0
    assert main(["report", *folder]) == 0
    assert "BertModel: 4 of 4 residual adds" in capsys.readouterr().out
    assert main(["report", "hf:somebody/model"]) == 2
    assert "not downloaded here" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["found.html", "found.svg", "found.png", "found.json"])
def test_a_report_is_written_as_a_file(models: Path, name: str) -> None:
    assert main(["report", "toy_models:build", "--input", "5,4", "--output", name]) == 0
    beginning = {".html": b"<!doctype html>", ".svg": b"<?xml", ".png": b"\x89PNG", ".json": b"{"}[Path(name).suffix]
    assert (models / name).read_bytes().startswith(beginning)


def test_files_of_other_kinds_are_refused(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "toy_models:build", "--output", "found.txt"]) == 2
    assert "'found.txt'" in capsys.readouterr().err
    assert main(["verify", "toy_models:build", "--input", "5,4", "--output", "found.html"]) == 2
    arguments = ["verify", "toy_models:build", "--input", "5,4", "--dtype", "float64", "--output", "found.json"]
    assert main(arguments) == 0
    assert json.loads((models / "found.json").read_text())["ok"] is True


def test_sums_that_are_no_residual_adds_are_listed_when_asked_for(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "toy_models:shifted"]) == 0
    assert "other sums" not in capsys.readouterr().out
    assert main(["report", "toy_models:shifted", "--sums"]) == 0
    assert "other sums" in capsys.readouterr().out


def test_progress_is_told_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mfx.cli.progress._EVERY", 0.01)
    with progress("waiting"):
        time.sleep(0.1)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress("waiting"):
        time.sleep(0.1)
    shown = capsys.readouterr().err
    assert "mfx: waiting, 0 s" in shown
    assert shown.endswith("\r\x1b[K")
