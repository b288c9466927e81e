"""M4: the momentumized model is, in everything but its forward, the model it was made from."""

from __future__ import annotations

import copy
import inspect
import io
import pickle

import pytest
import torch
from helpers import assert_same, backward, run
from nets import Block, ConvNet, Net, images, rows
from torch import nn

import mfx


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def one_step(model: nn.Module, x: torch.Tensor) -> None:
    backward(model(x))
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def test_state_dict_has_the_same_keys_in_the_same_order() -> None:
    model = ConvNet()
    assert list(mfx.momentumize(model).state_dict()) == list(model.state_dict())


def test_parameters_buffers_and_modules_are_the_same_objects_but_for_the_way_to_its_blocks() -> None:
    model = ConvNet()
    mm = mfx.momentumize(model)
    for table in ("named_parameters", "named_buffers", "named_modules"):
        ours, theirs = (dict(getattr(each, table)()) for each in (mm, model))
        assert list(ours) == list(theirs)
        guarded = [f"blocks.{place}" for place in range(len(model.blocks))]
        assert [name for name in theirs if ours[name] is not theirs[name]] == ["", "blocks", *guarded] * (
            table == "named_modules"
        )
    assert all(ours.__dict__ is theirs.__dict__ for ours, theirs in zip(mm.blocks, model.blocks, strict=True))
    assert type(mm) is ConvNet
    assert isinstance(mm.blocks, nn.Sequential)


def test_a_learned_velocity_adds_its_own_keys_and_no_other() -> None:
    model = Net()
    mm = mfx.momentumize(model, velocity=lambda chain: nn.Linear(6, 6).double())
    added = ["momentum_velocity.0.weight", "momentum_velocity.0.bias"]
    assert list(mm.state_dict()) == [*model.state_dict(), *added]


def test_the_given_model_stays_as_it_is() -> None:
    model = Net()
    before, tables = dict(model.__dict__), {key: dict(model.__dict__[key]) for key in ("_modules", "_parameters")}
    mm = mfx.momentumize(model, velocity=lambda chain: nn.Linear(6, 6).double())
    mm(rows())
    mm.head = nn.Identity()
    assert type(model) is Net
    assert "forward" not in vars(model)
    assert model.__dict__ == before
    assert {key: model.__dict__[key] for key in tables} == tables


def test_class_attributes_and_signature_are_the_models() -> None:
    model = Net()
    mm = mfx.momentumize(model)
    assert isinstance(mm, Net)
    assert mm.width == 6
    assert type(mm).__name__ == "Net"
    assert inspect.signature(mm.forward) == inspect.signature(model.forward)
    assert mm.forward.__doc__ == model.forward.__doc__


def test_a_model_moved_to_another_dtype_computes_in_it() -> None:
    model = Net()
    mm = mfx.momentumize(model)
    x = rows()
    mm(x)
    mm.to(torch.float32)
    assert {parameter.dtype for parameter in mm.parameters()} == {torch.float32}
    assert_same(run(mm, x.float()), run(mfx.momentumize(mm_original(mm), reversible=False), x.float()), 1e-5)


def mm_original(mm: nn.Module) -> Net:
    """A plain model with the state of a momentumized one."""
    model = Net().to(next(mm.parameters()).dtype)
    model.load_state_dict(mm.state_dict())
    return model


@pytest.mark.parametrize("captured_in_training", [True, False])
def test_train_and_eval_are_seen_whichever_the_capture_was_made_in(captured_in_training: bool) -> None:
    model = ConvNet().train(captured_in_training)
    mm = mfx.momentumize(model, 0.0)
    x = images()
    for training in (not captured_in_training, captured_in_training):
        assert_same(run(mm.train(training), x), run(model.train(training), x))


@pytest.mark.parametrize("steps_before", [0, 1])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded])
def test_a_copy_computes_the_same_and_is_independent(copied, steps_before: int) -> None:
    mm = mfx.momentumize(ConvNet(), 0.8)
    x = images()
    for _ in range(steps_before):
        one_step(mm, x)
    twin = copied(mm)
    assert type(twin) is type(mm)
    expected = run(mm, x)
    assert_same(run(twin, x), expected)
    one_step(twin, x)
    assert_same(run(mm, x), expected)
    mfx.set_gamma(twin, 0.1)
    assert_same(run(mm, x), expected)


def test_a_replaced_head_is_used() -> None:
    model = Net()
    mm = mfx.momentumize(model, 0.0)
    x = rows()
    mm(x)
    mm.head = model.head = nn.Linear(6, 3).double()
    assert_same(run(mm, x), run(model, x))


def test_a_replaced_inner_module_is_used() -> None:
    model = Net(p=0.0)
    mm = mfx.momentumize(model, 0.0)
    x = rows()
    mm(x)
    mm.blocks[1].down = nn.Sequential(nn.Linear(12, 12), nn.Dropout(0.3), nn.Linear(12, 6)).double()
    assert_same(run(mm, x), run(model, x))
    mm.blocks[0] = model.blocks[0] = Block(6).double()
    with pytest.raises(mfx.PlanChangedError, match=r"blocks\.0"):
        mm(x)


def test_a_loaded_state_dict_is_used() -> None:
    model, other = Net(), Net()
    mm = mfx.momentumize(model, 0.0)
    mm(rows())
    mm.load_state_dict(other.state_dict())
    x = rows()
    assert_same(run(mm, x), run(other, x))


def test_hooks_on_the_model_itself_run() -> None:
    mm = mfx.momentumize(Net())
    seen = []
    mm.register_forward_pre_hook(lambda module, args: seen.append("before"))
    mm.register_forward_hook(lambda module, args, output: seen.append("after"))
    mm.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    backward(mm(rows()))
    assert seen == ["before", "after", "backward"]


def test_hooks_of_the_given_model_run_as_well() -> None:
    model = Net()
    seen = []
    model.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    mm = mfx.momentumize(model)
    mm(rows())
    assert seen == [type(mm)]


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_a_hook_that_cannot_run_is_warned_of_by_name(register: str) -> None:
    model = Net()
    getattr(model.blocks[1], register)(lambda *_: None)
    with pytest.warns(mfx.HookWarning, match=r"blocks\.1 will not run"):
        mfx.momentumize(model)


def test_a_hook_that_cannot_run_is_warned_of_when_it_comes_later() -> None:
    mm = mfx.momentumize(Net())
    mm.blocks[1].register_forward_hook(lambda *_: None)
    with pytest.warns(mfx.HookWarning, match=r"blocks\.1 will not run"):
        mm(rows())


def test_hooks_on_modules_taken_whole_run() -> None:
    model = Net()
    seen = []
    model.blocks[1].down.register_forward_hook(lambda *_: seen.append("down"))
    mfx.momentumize(model)(rows())
    assert seen == ["down"]


def test_gamma_can_be_changed() -> None:
    model = Net()
    mm = mfx.momentumize(model, 0.9)
    x = rows()
    mm(x)
    mfx.set_gamma(mm, {"blocks.0": 0.3, "*": 0.0})
    assert_same(run(mm, x), run(mfx.momentumize(model, {"blocks.0": 0.3, "*": 0.0}, reversible=False), x))
    mfx.set_gamma(mm, 0.0)
    assert_same(run(mm, x), run(model, x))
    assert_same(run(mm.eval(), x), run(model.eval(), x))


class WithConstants(Net):
    """Uses tensors that are neither parameters nor buffers."""

    def __init__(self) -> None:
        super().__init__(p=0.0)
        self.scale = torch.tensor(2.0, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x * self.scale) + torch.ones(2, dtype=torch.float64)


def test_gamma_can_be_changed_where_the_graph_holds_constants() -> None:
    model = WithConstants()
    mm = mfx.momentumize(model, 0.9)
    mfx.set_gamma(mm, 0.0)
    x = rows()
    assert_same(run(mm, x), run(model, x))


def test_the_graph_prints_one_momentum_node_a_chain() -> None:
    names = [node.name for node in mfx.graph_of(mfx.momentumize(Net())).nodes]
    assert [name for name in names if name.startswith("momentum")] == ["momentum_0"]
