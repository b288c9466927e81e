"""M2, M8, M15: what FSDP2 shards by block has the gradients of the same recurrence unsharded, or there is an error."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from helpers import assert_same, relative_error
from nets import Block, Net
from recurrence import NetByHand
from sharded import by_block, momentum, process_group, run_sharded, whole
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1

import mfx
from mfx.run.tape import observing
from mfx.sharding import Units, is_distributed

ORDERS = pytest.mark.parametrize("order", ["before", "after"])


@pytest.fixture(autouse=True)
def alone(tmp_path) -> Iterator[None]:
    with process_group(tmp_path):
        yield


def net(block: Any = Block, **given: Any) -> Net:
    torch.manual_seed(0)
    return Net(block=block, **given)


def data() -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()


@ORDERS
@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("modules", [None, "blocks.?"])
def test_sharded_by_block_it_is_the_recurrence(order: str, gamma: float, reshard: bool, modules: Any):
    mm = momentum(net(), order, gamma, lambda m: by_block(m, reshard_after_forward=reshard), modules=modules)
    assert all(isinstance(block, FSDPModule) for block in mm.blocks)
    expected = run_sharded(NetByHand(net(), gamma), data())
    for _ in range(2):
        assert_same(run_sharded(mm, data()), expected)


@ORDERS
def test_no_unit_is_left_gathered_by_a_step(order: str):
    mm = momentum(net(), order)
    mm(data()).sum().backward()
    assert all(type(parameter).__name__ == "DTensor" for parameter in mm.parameters())


@ORDERS
def test_gradients_add_up_over_steps_and_wait_where_they_are_not_to_be_reduced(order: str):
    mm, x = momentum(net(p=0.0), order), data()
    expected = run_sharded(NetByHand(net(p=0.0), 0.8), x)
    for synced in (False, False, True):
        mm.set_requires_gradient_sync(synced)  # type: ignore[operator]
        out = mm(x.detach())
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        out.backward(cotangent)
        assert synced or all(parameter.grad is None for parameter in mm.parameters())
    for name, parameter in mm.named_parameters():
        assert relative_error(whole(parameter.grad), 3 * expected.grads[name]) < 1e-10


@ORDERS
def test_parameters_may_wait_on_the_host(order: str):
    mm = momentum(net(), order, shard=lambda m: by_block(m, offload_policy=CPUOffloadPolicy(pin_memory=False)))
    assert_same(run_sharded(mm, data()), run_sharded(NetByHand(net(), 0.8), data()))


@ORDERS
def test_mixed_precision_gives_what_the_stored_run_gives_up_to_it(order: str):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)

    def made(reversible: bool) -> nn.Module:
        shard = lambda m: by_block(m, mp_policy=policy)  # noqa: E731
        return momentum(net(p=0.0, depth=6).float(), order, shard=shard, reversible=reversible)

    x = data().detach().float()
    found, stored = run_sharded(made(True), x), run_sharded(made(False), x)
    exact = run_sharded(NetByHand(net(p=0.0, depth=6), 0.8), x.double())
    assert next(iter(found.outputs.values())).dtype == torch.bfloat16  # type: ignore[union-attr]
    assert relative_error(found.outputs, stored.outputs) == 0
    assert relative_error(found.grads, stored.grads) < relative_error(stored.grads, exact.grads)
    assert all(grad.dtype == torch.float32 for grad in found.grads.values())  # type: ignore[union-attr]


def test_the_precision_of_the_state_is_that_of_what_the_units_compute_in():
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, output_dtype=torch.float32)
    mm = net(depth=8).float()
    for block in mm.blocks:
        fully_shard(block, mp_policy=policy)
    mm = mfx.momentumize(mm, 0.8)
    seen: list[Any] = []
    with observing(lambda *state: None, lambda chain, plan: seen.append(plan)):
        mm(data().detach().float())
    assert [plan.tolerance for plan in seen] == [1e-2]


def lists_of_modules(model: Net) -> Net:
    fully_shard([model.blocks[0], model.blocks[1]])  # type: ignore[arg-type]
    fully_shard(model.blocks[2])
    return fully_shard(model)


def inside_of_blocks(model: Net) -> Net:
    for block in model.blocks:
        fully_shard(block.up)  # type: ignore[arg-type]
        fully_shard(block)
    return fully_shard(model)


def only_inside_of_blocks(model: Net) -> Net:
    for block in model.blocks:
        fully_shard(block.norm)  # type: ignore[arg-type]
        fully_shard(block.down)  # type: ignore[arg-type]
    return fully_shard(model)


def only_the_blocks(model: Net) -> Net:
    for block in model.blocks:
        fully_shard(block)
    return model


def the_body(model: Net) -> Net:
    fully_shard(model.blocks)
    return model


def the_body_by_block(model: Net) -> Net:
    fully_shard(only_the_blocks(model).blocks)
    return model


def stem_and_head(model: Net) -> Net:
    model.stem, model.head = nn.Sequential(model.stem, nn.Tanh()), nn.Sequential(nn.Tanh(), model.head)  # type: ignore
    return model


def all_of_it(model: Net) -> Net:
    fully_shard(model.stem)
    fully_shard(model.head)
    return by_block(model)


SHARDINGS = [lists_of_modules, inside_of_blocks, only_inside_of_blocks, only_the_blocks, the_body, the_body_by_block]


@ORDERS
@pytest.mark.parametrize("shard", [*SHARDINGS, all_of_it])
def test_whatever_else_is_sharded(order: str, shard: Callable[[Net], Net]):
    prepared = stem_and_head if shard is all_of_it else lambda model: model
    expected = run_sharded(NetByHand(prepared(net()), 0.8), data())
    mm = momentum(prepared(net()), order, shard=shard)
    for _ in range(2):
        assert_same(run_sharded(mm, data()), expected)


@ORDERS
@pytest.mark.parametrize("frozen", ["stem", "blocks.0", "blocks.1.up", "blocks", "head"])
def test_frozen_parameters_have_no_gradient_and_the_others_theirs(order: str, frozen: str):
    models = [net(), net()]
    for model in models:
        model.get_submodule(frozen).requires_grad_(False)
    x = data().detach()
    assert_same(run_sharded(momentum(models[0], order), x), run_sharded(NetByHand(models[1], 0.8), x))


class Idle(Block):
    """Has a parameter that it does not use."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.idle = nn.Linear(width, width)


@ORDERS
def test_a_parameter_that_is_not_used_has_no_gradient(order: str):
    found = run_sharded(momentum(net(Idle), order), data())
    assert_same(found, run_sharded(NetByHand(net(Idle), 0.8), data()))
    assert found.grads["blocks.1.idle.weight"] is None


@ORDERS
def test_a_backward_that_is_asked_for_some_gradients_accumulates_none(order: str):
    mm, x = momentum(net(p=0.0), order), data()
    (found,) = torch.autograd.grad(mm(x).square().sum(), x)
    (expected,) = torch.autograd.grad(NetByHand(net(p=0.0), 0.8)(x).square().sum(), x)
    assert relative_error(found, expected) < 1e-10
    assert all(parameter.grad is None for parameter in mm.parameters())
    mm(x).sum().backward(inputs=[x])
    assert all(parameter.grad is None for parameter in mm.parameters())
    assert_same(run_sharded(mm, x), run_sharded(NetByHand(net(p=0.0), 0.8), x))


@ORDERS
def test_a_graph_that_is_retained_gives_its_gradients_twice(order: str):
    mm, model, x = momentum(net(p=0.0), order), NetByHand(net(p=0.0), 0.8), data()
    for each in (mm, model):
        loss = each(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    ours = [whole(parameter.grad) for parameter in mm.parameters()]
    assert relative_error(ours, [parameter.grad for parameter in model.parameters()]) < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_a_sharded_parameter_that_is_changed_before_backward_is_refused(gamma: float):
    mm = momentum(net(), "before", gamma)
    loss = mm(data()).sum()
    with torch.no_grad():
        mm.blocks[1].up.weight.mul_(2)  # type: ignore[union-attr,operator]
    with pytest.raises(mfx.BackwardError, match=r"blocks\.1.*changed in place between forward and backward"):
        loss.backward()


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("root", [False, True])
def test_a_momentum_net_of_sharded_functions(reshard: bool, shared: bool, root: bool):
    def functions() -> list[nn.Module]:
        torch.manual_seed(0)
        made = [nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 6)).double() for _ in range(3)]
        return [made[0]] * 3 if shared else made

    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    expected = run_sharded(mfx.MomentumNet(functions(), 0.8, use_backprop=True), x)
    made = functions()
    mm = mfx.MomentumNet(made, 0.8, use_backprop=False)
    for function in dict.fromkeys(made):
        fully_shard(function, reshard_after_forward=reshard)
    if root:
        fully_shard(mm)
    for _ in range(2):
        assert_same(run_sharded(mm, x), expected)


class Kept(Block):
    """Keeps a value of its branch."""

    def forward(self, x: Tensor) -> Tensor:
        self.aux = torch.tanh(self.up(self.norm(x)))
        return x + self.down(self.aux)


@ORDERS
def test_what_a_sharded_block_keeps_has_its_gradient(order: str):
    def loss(model: nn.Module, blocks: Any) -> Tensor:
        return model(x).square().sum() + sum(block.aux.square().sum() for block in blocks)

    mm, model, x = momentum(net(Kept), order, modules="blocks.?"), net(Kept), data()
    loss(mm, mm.blocks).backward()
    loss(NetByHand(model, 0.8), model.blocks).backward()
    ours = [whole(parameter.grad) for parameter in mm.parameters()]
    assert relative_error(ours, [parameter.grad for parameter in model.parameters()]) < 1e-10


def test_the_whole_gradient_of_what_a_sharded_block_keeps_is_refused():
    mm = momentum(net(Kept), "before", modules="blocks.?")
    out = mm(data())
    mm.blocks[1].aux.retain_grad()  # type: ignore[union-attr,operator]
    with pytest.raises(mfx.BackwardError, match=r"fully_shard shards its parameters.*reversible=False"):
        out.sum().backward()


def test_a_momentumized_model_has_the_methods_of_a_sharded_one():
    model = by_block(net())
    mm = mfx.momentumize(model, 0.8)
    assert isinstance(mm, FSDPModule)
    mm.unshard()
    mm.reshard()
    mm.set_requires_all_reduce(True)
    assert_same(run_sharded(mm, data()), run_sharded(NetByHand(net(), 0.8), data()))


class Positions(Net):
    """Its root has a parameter of its own, and its constructor wants to be told."""

    def __init__(self, told: str) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(self.width, dtype=torch.float64))
        self.told = told

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x) + self.position))


@ORDERS
def test_parameters_of_the_root_are_there_when_it_runs(order: str):
    models = [Positions("so"), None]
    models[1] = copy.deepcopy(models[0])
    reference = mfx.momentumize(models[1], 0.8, reversible=False)
    assert_same(run_sharded(momentum(models[0], order), data()), run_sharded(reference, data()))


@pytest.mark.parametrize("budget", [1.0, 0.3, 0.0])
def test_within_a_budget(budget: float):
    mm = momentum(net(), "before", example_inputs=data().detach(), activation_budget=budget)
    assert_same(run_sharded(mm, data()), run_sharded(NetByHand(net(), 0.8), data()))


def test_a_report_of_a_sharded_model_runs_no_hooks_and_gathers_nothing():
    model = by_block(net())
    plain = mfx.report(net(), data().detach(), modules="blocks.?")
    found = mfx.report(model, data().detach())
    assert found.memory == plain.memory
    assert all(type(parameter).__name__ == "DTensor" for parameter in model.parameters())
    assert mfx.verify(model, data().detach(), gamma=0.8).ok


def test_a_capture_of_a_sharded_model_is_proven():
    mm = momentum(net(), "before")
    mm(data())
    entries = [entry for part in mfx.model.parts.parts_of(mm).values() for entry in part.entries]  # type: ignore
    assert entries
    assert all(entry.proven for entry in entries)


@pytest.mark.parametrize("where", ["the model", "blocks.1"])
def test_fsdp1_is_refused_with_what_does_instead(where: str):
    def wrap(module: nn.Module) -> Fsdp1:
        return Fsdp1(module, device_id=torch.device("cpu"), use_orig_params=True)

    model: Any = net()
    if where == "the model":
        model = wrap(model)
    else:
        model.blocks[1] = wrap(model.blocks[1])
    with pytest.raises(mfx.CaptureError, match=rf"{where} is wrapped.*FSDP1.*fully_shard \(FSDP2\)"):
        mfx.momentumize(model, 0.8)


@ORDERS
@pytest.mark.parametrize("shard", [by_block, lambda m: fully_shard(m.blocks[1]) and m])
def test_compiled_whole_it_is_refused_with_what_does_instead(order: str, shard: Any, fresh_dynamo: None):
    compiled = torch.compile(momentum(net(), order, shard=shard), backend="eager")
    with pytest.raises(Exception, match=r"CompileError: .*fully_shard shards parts of it \(.*1.*block\.compile\(\)"):
        compiled(data())


def test_the_pass_inside_of_a_compiler_is_refused_with_what_does_instead(fresh_dynamo: None):
    compiled = torch.compile(by_block(net()), backend="mfx", options={"inner": "eager"})
    with pytest.raises(Exception, match=r"CompileError: .*hooks of fully_shard.*block\.compile\(\)"):
        compiled(data())


def test_fsdp1_around_the_whole_momentumized_model_is_right():
    mm = Fsdp1(mfx.momentumize(net(), 0.8), device_id=torch.device("cpu"), use_orig_params=True)
    expected = run_sharded(NetByHand(net(), 0.8), data())
    found = run_sharded(mm, data())
    for ours, theirs in zip(found.grads.values(), expected.grads.values(), strict=True):
        assert relative_error(ours.view(theirs.shape), theirs) < 1e-10  # type: ignore[union-attr]


@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_parameters_that_zero_3_has_partitioned_are_refused(gamma: float):
    mm = mfx.momentumize(net(), gamma)
    for number, parameter in enumerate(mm.parameters()):
        parameter.ds_id = number  # type: ignore[attr-defined]
    with pytest.raises(mfx.BackwardError, match=r"block 'blocks\.0'.*ZeRO stage 3.*stage 1 or 2.*FSDP2"):
        mm(data())


def test_units_are_those_whose_hooks_run():
    model = net()
    assert Units.of(model.modules()) is None
    assert not is_distributed(model)
    by_block(model)
    units = Units.of(model.modules())
    assert units is not None
    assert len(units.modules) == 1 + len(model.blocks)
    assert units.hold(model.blocks[0].up, "weight")  # type: ignore[arg-type]
    assert not units.hold(model.blocks[0].up, "other")  # type: ignore[arg-type]
    assert units.anchor is not None
    model.requires_grad_(False)
    assert Units.of(model.modules()).anchor is None  # type: ignore[union-attr]
