"""torch.export and ONNX of momentumized models in evaluation: the momentum network, at every size asked for."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torchvision
from nets import Block, ConvNet, Net, images, rows
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

import mfx
from mfx.graph.notes import STATE

GAMMA = 0.7
BATCH = torch.export.Dim("batch")
STRICT = pytest.mark.parametrize("strict", [False, True])
pytestmark = pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")


class Stack(nn.Module):
    """Blocks, and Python that looks at the batch's size."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 6:
            x = 2 * x
        for block in self.blocks:
            x = block(x)
        return x


class Looking(nn.Module):
    """Only Dynamo can follow what its stack does."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stack = nn.Linear(4, 6), Stack()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.stack(self.stem(x))


def by_hand(model: Any, x: Tensor, velocity: Any = torch.zeros_like) -> Tensor:
    x = model.stem(x)
    v = velocity(x)
    for block in model.blocks:
        v = GAMMA * v + (1 - GAMMA) * (block(x) - x)
        x = x + v
    return model.head(x)


def llama() -> tuple[nn.Module, dict[str, Any]]:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=32, num_key_value_heads=2, max_position_embeddings=32, **sizes)
    return transformers.LlamaForCausalLM(config).eval(), {"input_ids": torch.arange(16).view(2, 8), "use_cache": False}


@STRICT
@pytest.mark.parametrize("capture", ["fx", "dynamo"])
@pytest.mark.parametrize("grad", [True, False])
def test_an_exported_model_is_the_momentum_network_at_other_batches_too(
    strict: bool, capture: str, grad: bool, fresh_dynamo: None
) -> None:
    model, x = Net().eval(), rows().detach()
    mm = mfx.momentumize(model, GAMMA, example_inputs=x, capture=capture)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(mm, (x,), strict=strict, dynamic_shapes=({0: BATCH},)).module()
    y = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(exported(y), by_hand(model, y))


@STRICT
def test_an_exported_convolution_network_has_its_running_statistics(strict: bool, fresh_dynamo: None) -> None:
    model, x = ConvNet(), images().detach()
    for _ in range(3):
        model(x)
    mm = mfx.momentumize(model.eval(), GAMMA)
    exported = torch.export.export(mm, (x,), strict=strict, dynamic_shapes=({0: BATCH},)).module()
    y = images(7).detach()
    torch.testing.assert_close(exported(y), mm(y))


@STRICT
def test_a_language_model_is_exported_at_every_length(strict: bool, fresh_dynamo: None) -> None:
    model, call = llama()
    mm = mfx.momentumize(model, 0.9, example_inputs=call)
    sizes = {"input_ids": {0: BATCH, 1: torch.export.Dim("length", max=32)}, "use_cache": None}
    exported = torch.export.export(mm, (), call, strict=strict, dynamic_shapes=sizes).module()
    other = {"input_ids": torch.arange(30).view(3, 10), "use_cache": False}
    torch.testing.assert_close(exported(**other).logits, mm(**other).logits)
    assert (mm(**other).logits - model(**other).logits).abs().max() > 1e-2


@STRICT
def test_what_python_asked_of_a_size_is_a_constraint_of_the_exported_program(strict: bool, fresh_dynamo: None) -> None:
    model, x = Looking().eval(), rows().detach()
    mm = mfx.momentumize(model, GAMMA, example_inputs=x, capture="dynamo")
    with pytest.raises(Exception, match="<= 6"):
        torch.export.export(mm, (x,), strict=strict, dynamic_shapes=({0: BATCH},))
    exported = torch.export.export(mm, (x,), strict=strict, dynamic_shapes=({0: torch.export.Dim.AUTO},)).module()
    torch.testing.assert_close(exported(x[:4]), mm(x[:4]))
    with pytest.raises(AssertionError, match="<= 6"):
        exported(torch.randn(9, 4, dtype=torch.float64))


def test_an_export_leaves_no_graph_behind(fresh_dynamo: None) -> None:
    model, x = Looking().eval(), rows().detach()
    mm = mfx.momentumize(model, GAMMA, example_inputs=x, capture="dynamo")
    before = mm(x)
    entries = list(mm.stack.__dict__[STATE].entries)
    torch.export.export(mm, (x,), strict=False, dynamic_shapes=({0: torch.export.Dim.AUTO},))
    assert mm.stack.__dict__[STATE].entries == entries
    assert torch.equal(mm(x), before)
    mm(x).sum().backward()
    assert model.stem.weight.grad is not None


@STRICT
@pytest.mark.parametrize("gamma", [GAMMA, mfx.LearnedGamma(GAMMA)])
def test_learned_velocities_and_gammas_are_exported(strict: bool, gamma: Any, fresh_dynamo: None) -> None:
    model, x = Net().eval(), rows().detach()
    mm = mfx.momentumize(model, gamma, velocity=lambda chain: nn.Linear(6, 6).double())
    exported = torch.export.export(mm, (x,), strict=strict, dynamic_shapes=({0: BATCH},)).module()
    y = torch.randn(9, 4, dtype=torch.float64)
    torch.testing.assert_close(exported(y), by_hand(model, y, mm.momentum_velocity["0"]))
    added = {name for name in dict(mm.named_parameters()) if name.startswith("momentum_")}
    assert added <= set(dict(exported.named_parameters()))


def test_a_budget_changes_nothing_of_what_is_exported(fresh_dynamo: None) -> None:
    model, x = Net().eval(), rows().detach()
    mm = mfx.momentumize(model, GAMMA, example_inputs=x, activation_budget=0.0)
    torch.testing.assert_close(torch.export.export(mm, (x,)).module()(2 * x), by_hand(model, 2 * x))


@pytest.mark.parametrize("capture", ["fx", "dynamo"])
def test_onnx_is_the_momentum_network(capture: str, tmp_path: Any, fresh_dynamo: None) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = Net().float().eval(), rows().detach().float()
    mm = mfx.momentumize(model, GAMMA, example_inputs=x, capture=capture)
    torch.onnx.export(mm, (x,), dynamo=True, dynamic_shapes=({0: BATCH},)).save(tmp_path / "net.onnx")
    session = runtime.InferenceSession(tmp_path / "net.onnx")
    y = torch.randn(9, 4)
    (found,) = session.run(None, {session.get_inputs()[0].name: y.numpy()})
    torch.testing.assert_close(torch.tensor(found), by_hand(model, y))


def test_onnx_of_a_language_model(tmp_path: Any, fresh_dynamo: None) -> None:
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, call = llama()
    mm = mfx.momentumize(model, 0.9, example_inputs=call)
    sizes = {"input_ids": {0: BATCH, 1: torch.export.Dim("length", max=32)}, "use_cache": None}
    torch.onnx.export(mm, (), kwargs=call, dynamo=True, dynamic_shapes=sizes).save(tmp_path / "llama.onnx")
    session = runtime.InferenceSession(tmp_path / "llama.onnx")
    words = torch.arange(30).view(3, 10)
    (found,) = session.run(None, {session.get_inputs()[0].name: words.numpy()})
    torch.testing.assert_close(torch.tensor(found), mm(words, use_cache=False).logits)


def test_a_feature_extractor_is_made_of_the_original() -> None:
    model, x = torchvision.models.resnet18(weights=None).eval(), torch.randn(2, 3, 64, 64)
    with pytest.raises(mfx.CaptureError, match="made of the original"):
        create_feature_extractor(mfx.momentumize(model, GAMMA), ["layer1"])
    features = create_feature_extractor(model, {"layer1": "first", "layer4": "last"})
    plain = features(x)
    for name, value in mfx.momentumize(features, 0.0)(x).items():
        assert torch.equal(value, plain[name])
    mm = mfx.momentumize(features, GAMMA)
    assert not torch.allclose(mm(x)["last"], plain["last"])
    with pytest.raises(mfx.PlanChangedError, match="one for each mode"):
        mm.train()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_a_momentumized_graph_module_are_momentum_networks(copied: Any) -> None:
    model, x = Net().eval(), rows()
    mm = mfx.momentumize(torch.fx.symbolic_trace(model), GAMMA)
    torch.testing.assert_close(copied(mm)(x), by_hand(model, x))
    mfx.set_gamma(mm, 0.0)
    kept = copied is copy.deepcopy
    torch.testing.assert_close(copied(mm)(x), model(x))
    assert kept or copied(mm).stem is mm.stem
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(mm)
