"""A momentumized Hugging Face model is saved with what makes it one, and comes back as the same function."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from language import MODELS, WORDS, bert, llama, step
from nets import Net, rows
from safetensors.torch import load_file
from torch import nn

import mfx
from mfx.model.saved import MARK, form_of, inputs_of

KINDS = pytest.mark.parametrize("kind", sorted(MODELS))


def momentumized(kind: str, gamma: Any = 0.5, **options: Any) -> tuple[nn.Module, dict[str, Any], nn.Module]:
    make, call = MODELS[kind]
    model = make().eval()
    return mfx.momentumize(model, gamma, example_inputs=call, **options), call, model


@KINDS
def test_what_was_saved_comes_back_as_the_same_function(kind: str, tmp_path: Path, fresh_dynamo: None) -> None:
    mm, call, model = momentumized(kind)
    mm.save_pretrained(tmp_path)
    for again in (mfx.from_pretrained(tmp_path), mfx.from_pretrained(type(model), tmp_path)):
        assert torch.equal(again.eval()(**call).logits, mm(**call).logits)
        assert not hasattr(again.config, "mfx")
        assert [chain.blocks for chain in mfx.chains(again)] == [chain.blocks for chain in mfx.chains(mm)]
    assert not torch.equal(model(**call).logits, mm(**call).logits)
    assert not hasattr(mm.config, "mfx"), "the model's own configuration is as before"


@KINDS
def test_gradients_are_those_of_the_model_that_was_saved(kind: str, tmp_path: Path, fresh_dynamo: None) -> None:
    mm, call, _ = momentumized(kind)
    mm.save_pretrained(tmp_path)
    (loss, found), (expected, wanted) = step(mfx.from_pretrained(tmp_path), call), step(mm, call)
    assert torch.equal(loss, expected)
    torch.testing.assert_close(found, wanted)


def test_gammas_of_now_and_options_are_saved(tmp_path: Path, fresh_dynamo: None) -> None:
    mm, call, _ = momentumized("llama", exclude="*layers.0*", tolerance=1e-3, state_dtype=torch.float64)
    blocks = [name for chain in mfx.chains(mm) for name in chain.blocks]
    mfx.set_gamma(mm, {blocks[0]: 0.25, "*": 0.75})
    mm.save_pretrained(tmp_path)
    again = mfx.from_pretrained(tmp_path).eval()
    gammas = [gamma for chain in mfx.chains(again) for gamma in chain.gammas]
    assert gammas == [0.25] + [0.75] * (len(blocks) - 1)
    assert torch.equal(again(**call).logits, mm(**call).logits)
    recipe = json.loads((tmp_path / "config.json").read_text())["mfx"]
    assert recipe["options"]["tolerance"] == 1e-3
    assert recipe["options"]["state_dtype"] == {"dtype": "float64"}
    assert recipe["options"]["exclude"] == ["*layers.0*"]


@pytest.mark.parametrize(
    "options",
    [
        {"rule": "midpoint"},
        {"rule": "leapfrog", "h": 0.5},
        {"rule": mfx.Momentum(0.6)},
        {"gamma": 0.7, "readout": "z"},
        {"gamma": 0.7, "granularity": "layer"},
        {"gamma": 0.7, "velocity": "first"},
        {"gamma": mfx.RandomSign(0.5)},
        {"gamma": mfx.LearnedGamma(0.7)},
    ],
    ids=str,
)
def test_rules_readouts_levels_and_learned_gammas_come_back(options: Any, tmp_path: Path, fresh_dynamo: None) -> None:
    make, call = MODELS["llama"]
    model = make().eval()
    mm = mfx.momentumize(model, example_inputs=call, **options)
    untrained = mm(**call).logits
    learned = [parameter for name, parameter in mm.named_parameters() if "momentum_gamma" in name]
    with torch.no_grad():
        for parameter in learned:
            parameter.add_(torch.randn_like(parameter))
    assert torch.equal(untrained, mm(**call).logits) is not bool(learned)
    mm.save_pretrained(tmp_path)
    assert MARK in heard(lambda: type(model).from_pretrained(tmp_path))
    again = mfx.from_pretrained(tmp_path)
    found = []
    for one in (again, mm):
        torch.manual_seed(0)  # random signs are drawn in train mode
        found += [one.eval()(**call).logits, one.train()(**call).logits]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert not torch.equal(found[1], model.train()(**call).logits)


@dataclass(frozen=True)
class Own(mfx.Rule):
    """A rule of the user's."""

    decay = 0.5
    pull = 0.5


def test_a_rule_of_ones_own_is_given_again(tmp_path: Path, fresh_dynamo: None) -> None:
    make, call = MODELS["llama"]
    mm = mfx.momentumize(make().eval(), example_inputs=call, rule=Own())
    mm.save_pretrained(tmp_path)
    with pytest.raises(mfx.OptionError, match=r"rule=.*Own, which is Python and was not saved: give rule= again"):
        mfx.from_pretrained(tmp_path)
    assert torch.equal(mfx.from_pretrained(tmp_path, rule=Own()).eval()(**call).logits, mm(**call).logits)


def test_what_is_given_comes_before_what_was_saved(tmp_path: Path, fresh_dynamo: None) -> None:
    mm, call, model = momentumized("bert")
    mm.save_pretrained(tmp_path)
    plain = mfx.from_pretrained(tmp_path, gamma=0.0).eval()
    torch.testing.assert_close(plain(**call).logits, model(**call).logits)


def test_a_plain_directory_is_momentumized_if_a_gamma_is_given(tmp_path: Path, fresh_dynamo: None) -> None:
    model = llama().eval()
    model.save_pretrained(tmp_path)
    with pytest.raises(mfx.OptionError, match="give gamma="):
        mfx.from_pretrained(tmp_path)
    call = MODELS["llama"][1]
    mm = mfx.from_pretrained(transformers.AutoModelForCausalLM, tmp_path, gamma=0.5, example_inputs=call).eval()
    expected = mfx.momentumize(model, 0.5, example_inputs=call)
    torch.testing.assert_close(mm(**call).logits, expected(**call).logits)


def test_learned_velocities_are_loaded_by_hand(tmp_path: Path, fresh_dynamo: None) -> None:
    config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    model, pixels = transformers.ViTModel(config).eval(), torch.randn(2, 3, 224, 224)

    def velocity(chain: Any) -> nn.Module:
        return nn.Linear(16, 16)

    call = {"pixel_values": pixels}
    mm = mfx.momentumize(model, 0.5, example_inputs=call, velocity=velocity).eval()
    mm.save_pretrained(tmp_path)
    with pytest.raises(mfx.OptionError, match=r"plain class from there.*load_state_dict\(\.\.\., strict=False\)"):
        mfx.from_pretrained(tmp_path, velocity=velocity)
    plain = transformers.ViTModel.from_pretrained(tmp_path).eval()
    again = mfx.momentumize(plain, 0.5, example_inputs=call, velocity=velocity)
    again.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert torch.equal(again(**call)[0], mm(**call)[0])


class Heard(logging.Handler):
    """What a logger was told."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def heard(load: Any) -> str:
    logger, handler = logging.getLogger("transformers"), Heard()
    logger.addHandler(handler)
    try:
        load()
    finally:
        logger.removeHandler(handler)
    return "\n".join(handler.texts)


def test_loading_it_as_the_plain_network_is_told(tmp_path: Path, fresh_dynamo: None) -> None:
    mm, _, model = momentumized("bert")
    mm.save_pretrained(tmp_path / "momentum")
    assert MARK in heard(lambda: type(model).from_pretrained(tmp_path / "momentum"))
    assert MARK not in heard(lambda: mfx.from_pretrained(tmp_path / "momentum"))
    mfx.set_gamma(mm, 0.0)
    mm.save_pretrained(tmp_path / "plain")  # at gamma 0 it is the plain network
    assert MARK not in heard(lambda: type(model).from_pretrained(tmp_path / "plain"))


@KINDS
def test_the_class_of_a_momentumized_model_makes_no_plain_ones(kind: str, tmp_path: Path, fresh_dynamo: None) -> None:
    mm, call, model = momentumized(kind)
    mm.save_pretrained(tmp_path)
    assert isinstance(mm, type(model))
    assert type(mm).__name__ == type(model).__name__
    with pytest.raises(mfx.InputTypeError, match="momentumize one of that class"):
        type(mm)(model.config)
    with pytest.raises(mfx.InputTypeError, match=r"mfx\.from_pretrained"):
        type(mm).from_pretrained(tmp_path)
    for twin in (copy.deepcopy(mm), pickle.loads(pickle.dumps(mm))):
        assert torch.equal(twin(**call).logits, mm(**call).logits)


def test_a_model_of_another_library_is_of_its_own_class() -> None:
    mm = mfx.momentumize(Net(), 0.5)
    assert type(mm) is Net
    assert mm(rows()).shape == (5, 2)


def test_inputs_are_those_of_their_form() -> None:
    inputs = {
        "words": WORDS,
        "pixels": torch.randn(2, 3),
        "more": (torch.ones(1, dtype=torch.bool), None),
        "flag": True,
    }
    again = inputs_of(json.loads(json.dumps(form_of(inputs))))
    assert again["words"].shape == WORDS.shape
    assert again["words"].dtype == WORDS.dtype
    assert again["pixels"].dtype == torch.float32
    assert again["more"][0].dtype == torch.bool
    assert (again["more"][1], again["flag"]) == (None, True)
    assert isinstance(bert(), nn.Module)
