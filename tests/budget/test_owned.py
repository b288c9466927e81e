"""Owned: the bytes of parameters, gradients, buffers and an optimizer's state, against those of real ones."""

from __future__ import annotations

import pytest
import torch
from peaks import allocated_peak
from torch import nn

import mfx
from mfx.budget.owned import owned_by
from mfx.options import check_optimizer

OPTIMIZERS = ["SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "Adafactor", "ASGD"]
OPTIMIZERS += ["RMSprop", "Rprop"]


def model():
    return nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.Linear(64, 16))


def stepped(optimizer):
    """The bytes that one real step leaves in an optimizer's state."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [value for one in optimizer.state.values() for value in one.values() if isinstance(value, torch.Tensor)]
    return sum(value.numel() * value.element_size() for value in state)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_state_is_what_a_real_step_makes(name):
    kind = getattr(torch.optim, name)
    expected = stepped(kind(model().parameters()))
    for given in (name, name.lower(), kind):
        assert owned_by(model(), check_optimizer(given)).state == expected
    net = model()
    assert owned_by(net, kind(net.parameters())).state == expected


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9}], ids=["plain", "momentum"])
def test_a_callable_says_how_the_optimizer_is_set(settings):
    found = owned_by(model(), lambda parameters: torch.optim.SGD(parameters, lr=0.1, **settings))
    assert found.state == stepped(torch.optim.SGD(model().parameters(), lr=0.1, **settings))
    assert (found.state > 0) == bool(settings)


def test_groups_of_an_optimizer_count_alone_and_frozen_parameters_have_no_gradient():
    net = model()
    net[0].requires_grad_(False)
    head = torch.optim.Adam([{"params": net[2].parameters(), "lr": 0.1}])
    found = owned_by(net, head)
    sizes = {name: parameter.numel() * 4 for name, parameter in net.named_parameters()}
    assert found.parameters == sum(sizes.values())
    assert found.gradients == sum(size for name, size in sizes.items() if not name.startswith("0."))
    assert found.buffers == 64 * 4 * 2 + 8
    assert found.state == 2 * (sizes["2.weight"] + sizes["2.bias"]) + 2 * 4


def test_shared_parameters_count_once():
    net = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    net[1].weight = net[0].weight
    found = owned_by(net, torch.optim.Adam)
    assert (found.parameters, found.gradients, found.state) == (256, 256, 2 * 256 + 4)


def test_an_optimizer_that_is_made_already_is_left_as_it_is():
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # puts a step of its own on the optimizer
    ran = []
    optimizer.register_step_pre_hook(lambda *_: ran.append("before"))
    before = [parameter.detach().clone() for parameter in net.parameters()]
    assert owned_by(net, optimizer).state == stepped(torch.optim.AdamW(model().parameters()))
    assert not optimizer.state
    assert not ran
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == set(map(id, net.parameters()))
    optimizer.step()
    assert ran == ["before"]


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop"])
def test_what_a_step_needs_for_itself_is_what_the_allocator_gives_it(name, foreach):
    kind = getattr(torch.optim, name)
    net = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256))
    optimizer = kind(net.parameters(), foreach=foreach)
    found = owned_by(net, optimizer)
    stepped(optimizer)
    assert found.updating == pytest.approx(allocated_peak(optimizer.step), rel=0.02, abs=256)
    assert (found.updating == 0) == (name == "SGD")


@pytest.mark.parametrize(
    ("optimizer", "error", "message"),
    [
        ("adamm", mfx.OptionError, "optimizer='adamm' is no class of torch.optim; near names: Adam"),
        ("Optimizer", mfx.OptionError, "is no class of torch.optim"),
        (3, mfx.InputTypeError, r"optimizer=3 is a int: give a class"),
        ("LBFGS", mfx.OptionError, r"optimizer=LBFGS cannot take a step .*closure.*lambda parameters"),
        ("SparseAdam", mfx.OptionError, r"optimizer=SparseAdam cannot take a step .*dense"),
        (lambda parameters: 3, mfx.OptionError, r"optimizer=<lambda> gave int"),
        (torch.optim.SGD(nn.Linear(2, 2).parameters()), mfx.OptionError, "optimizer=SGD holds parameters that are not"),
    ],
)
def test_what_is_no_optimizer_of_the_model_is_refused_with_the_remedy(optimizer, error, message):
    with pytest.raises(error, match=message):
        mfx.report(model(), optimizer=optimizer)
