"""Under transformers' Trainer, with its checkpointing, and with adapters of PEFT in both orders."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from language import BERT_CALL, MODELS, Sentences, bert, step
from torch import nn

import mfx
from mfx.model import checkpointing

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.fixture(autouse=True)
def _told_nobody() -> None:
    checkpointing._told.clear()


class Logged(transformers.TrainerCallback):
    """What a Trainer logs."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **given: Any) -> None:
        if "loss" in logs:
            self.rows.append(dict(logs))


def trained(
    model: nn.Module, path: Path, steps: int = 4, callbacks: Any = (), resume: str | None = None, **given: Any
) -> list[dict[str, float]]:
    pytest.importorskip("accelerate")
    sizes = {"per_device_train_batch_size": 4, "max_steps": steps, "logging_steps": 1, "save_steps": 2}
    options = {"use_cpu": True, "disable_tqdm": True, "report_to": [], **sizes, **given}
    logged = Logged()
    arguments = transformers.TrainingArguments(str(path), **options)
    trainer = transformers.Trainer(model, arguments, train_dataset=Sentences(), callbacks=[*callbacks, logged])
    trainer.train(resume_from_checkpoint=resume)
    return logged.rows


def losses(rows: list[dict[str, float]]) -> list[float]:
    return [row["loss"] for row in rows]


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_checkpointing_in_the_trainer_changes_no_bit_and_is_told_once(
    gamma: float, tmp_path: Path, fresh_dynamo: None
) -> None:
    torch.manual_seed(0)
    model = bert()
    runs = []
    for on in (False, True):
        mm = mfx.momentumize(copy.deepcopy(model), gamma, example_inputs=BERT_CALL)
        if on:
            with pytest.warns(mfx.CheckpointingWarning) as told:
                runs.append(losses(trained(mm, tmp_path, gradient_checkpointing=True)))
            assert sum(issubclass(one.category, mfx.CheckpointingWarning) for one in told) == 1
        else:
            runs.append(losses(trained(mm, tmp_path)))
    assert len(runs[0]) == 4
    assert runs[0] == runs[1]
    assert len(set(runs[0])) == 4


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_switches_of_checkpointing_and_of_inputs_change_no_gradient(kind: str, fresh_dynamo: None) -> None:
    make, call = MODELS[kind]
    mm = mfx.momentumize(make(), 0.9, example_inputs=call)
    expected = step(mm, call)
    mm.gradient_checkpointing_enable()
    mm.enable_input_require_grads()
    with pytest.warns(mfx.CheckpointingWarning):
        found = step(mm, call)
    assert torch.equal(found[0], expected[0])
    assert all(torch.equal(found[1][name], grad) for name, grad in expected[1].items())
    mm.gradient_checkpointing_disable()
    assert torch.equal(step(mm, call)[0], expected[0])


def test_the_callback_anneals_gamma_and_goes_on_where_a_checkpoint_was(tmp_path: Path, fresh_dynamo: None) -> None:
    from mfx.integrations.transformers import GammaCallback

    torch.manual_seed(0)
    model = bert()
    mm = mfx.momentumize(copy.deepcopy(model), 0.0, example_inputs=BERT_CALL)
    rows = trained(mm, tmp_path, callbacks=[GammaCallback(0.0, 0.8, steps=4)])
    assert [round(row["gamma"], 6) for row in rows] == [0.2, 0.4, 0.6, 0.8]
    assert mfx.chains(mm)[0].gammas[0] == 0.8
    resumed = mfx.momentumize(copy.deepcopy(model), 0.0, example_inputs=BERT_CALL)
    checkpoint = str(tmp_path / "checkpoint-2")
    again = trained(resumed, tmp_path, callbacks=[GammaCallback(0.0, 0.8, steps=4)], resume=checkpoint)
    assert losses(again) == losses(rows)[2:]
    saved = mfx.from_pretrained(tmp_path / "checkpoint-4").eval()
    assert torch.equal(saved(**BERT_CALL).logits, mm.eval()(**BERT_CALL).logits)


def test_without_steps_the_callback_takes_all_of_the_training(tmp_path: Path, fresh_dynamo: None) -> None:
    from mfx.integrations.transformers import GammaCallback

    mm = mfx.momentumize(bert(), 0.0, example_inputs=BERT_CALL)
    rows = trained(mm, tmp_path, callbacks=[GammaCallback(0.0, 0.8, shape="cosine")])
    assert rows[1]["gamma"] == pytest.approx(0.4)
    assert rows[-1]["gamma"] == pytest.approx(0.8)


def adapted(model: nn.Module, kind: str, **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    names = {"bert": ["query", "value"], "llama": ["q_proj", "v_proj"]}[kind]
    found = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names, **options))
    torch.manual_seed(2)
    for name, parameter in found.named_parameters():
        if "lora_" in name:  # half of it is zero at first, where nothing would be seen of a wrong gradient
            nn.init.normal_(parameter, std=0.1)
    return found


@pytest.mark.parametrize("kind", sorted(MODELS))
def test_adapters_put_on_before_and_after_give_the_stored_gradients(kind: str, fresh_dynamo: None) -> None:
    make, call = MODELS[kind]
    model = make()
    stored = mfx.momentumize(adapted(copy.deepcopy(model), kind), 0.9, example_inputs=call, reversible=False)
    loss, expected = step(stored, call)
    before = mfx.momentumize(adapted(copy.deepcopy(model), kind), 0.9, example_inputs=call)
    after = adapted(mfx.momentumize(copy.deepcopy(model), 0.9, example_inputs=call), kind)
    for mm in (before, after):
        found = step(mm, call)
        torch.testing.assert_close(found[0], loss)
        assert set(found[1]) == set(expected)
        assert expected
        torch.testing.assert_close(found[1], expected, rtol=1e-4, atol=1e-6)
    merged = after.eval().merge_and_unload()
    torch.testing.assert_close(merged(**call).logits, stored.eval()(**call).logits, rtol=1e-4, atol=1e-5)


def test_an_adapter_that_reads_weights_in_python_is_refused_with_its_line(fresh_dynamo: None) -> None:
    model = adapted(bert(), "bert", use_dora=True)
    with pytest.raises(mfx.CaptureError, match=r"peft.*\.py"):
        mfx.momentumize(model, 0.9, example_inputs=BERT_CALL)
