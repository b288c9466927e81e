"""MomentumNet against the recurrence written out, in train mode with dropout and batch norm alive."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers import assert_same, kept_bytes, relative_error, run
from nets import Net
from torch import Tensor, nn

import mfx

WIDTH = 6


class Branch(nn.Module):
    """A branch with everything that reversible code gets wrong, and extra arguments."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.up = nn.Linear(WIDTH, 9)
        self.drop = nn.Dropout(p)
        self.down = nn.Linear(9, WIDTH)

    def forward(self, x: Tensor, side: Tensor | None = None, *, factor: Any = 1.0) -> Tensor:
        """The branch's value, with ``side`` added and ``factor`` times."""
        value = self.down(self.drop(torch.tanh(self.up(self.norm(x)))))
        return (value if side is None else value + side) * factor


class Plain(nn.Module):
    """The same network as Python says it."""

    def __init__(self, net: mfx.MomentumNet, is_residual: bool) -> None:
        super().__init__()
        self.network, self.gamma, self.is_residual = net.network, net.gamma, is_residual
        self.depth, self.init_speed = len(net), net.init_speed

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x_n."""
        v = self.network["init"](x) if self.init_speed else torch.zeros_like(x)
        for index in range(self.depth):
            f = self.network[str(index)](x, *args, **kwargs)
            v = self.gamma * v + (1 - self.gamma) * (f if self.is_residual else f - x)
            x = x + v
        return x


def branches(depth: int = 4, p: float = 0.3) -> list[nn.Module]:
    torch.manual_seed(depth)
    return [Branch(p) for _ in range(depth)]


def net_of(gamma: float = 0.8, depth: int = 4, p: float = 0.3, **given: Any) -> mfx.MomentumNet:
    return mfx.MomentumNet(branches(depth, p), gamma, **given).double()


def rows(count: int = 5) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(count, WIDTH, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("is_residual", [True, False])
@pytest.mark.parametrize("use_backprop", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 1.0])
def test_it_is_the_recurrence(gamma, use_backprop, is_residual, init, train):
    given = {"init_speed": True, "init_function": nn.Linear(WIDTH, WIDTH)} if init else {}
    net = net_of(gamma, use_backprop=use_backprop, is_residual=is_residual, **given).train(train)
    found, expected = run(net, rows()), run(Plain(net, is_residual), rows())
    if gamma == 0:  # v_0 has no effect: its gradient is zero by hand, and None here
        expected.grads.update({name: None for name in expected.grads if "init" in name})
    assert_same(found, expected, 1e-9)


@pytest.mark.parametrize("use_backprop", [True, False])
def test_extra_arguments_reach_every_function_and_get_their_gradients(use_backprop):
    net = net_of(use_backprop=use_backprop)
    side = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    factor = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    plain = Plain(net, True)
    for args, kwargs in [
        ((side,), {}),
        ((), {"side": side}),
        ((side,), {"factor": factor}),
        ((None,), {"factor": 2}),
        ((), {"factor": 0.5}),
    ]:
        assert_same(run(net, rows(), *args, **kwargs), run(plain, rows(), *args, **kwargs), 1e-9)
        changed = run(net, rows(), *args, **kwargs)
        assert relative_error(changed.outputs, run(net, rows()).outputs) > 1e-3, "the argument has no effect"


def test_tensors_in_containers_are_side_inputs():
    class Pick(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor, given: dict[str, Any]) -> Tensor:
            return self.linear(x) + given["sides"][1]

    net = mfx.MomentumNet([Pick() for _ in range(3)], 0.8, use_backprop=False).double()
    given = {"sides": [None, torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)]}
    assert_same(run(net, rows(), given), run(Plain(net, True), rows(), given), 1e-9)


def test_a_tensor_hidden_in_an_object_is_refused():
    class Holder:
        def __init__(self) -> None:
            self.value = torch.ones(WIDTH, requires_grad=True)

    with pytest.raises(mfx.InputTypeError, match=r"Holder holds a tensor .*'value'.* in tuples, lists or dicts"):
        net_of()(rows(), Holder())


def test_the_same_module_may_be_there_several_times():
    function = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    net = mfx.MomentumNet([function] * 10, 0.9, use_backprop=False).double()
    assert len(net) == 10
    assert len(list(net.parameters())) == 2
    assert_same(run(net, rows()), run(Plain(net, True), rows()), 1e-9)


def test_kept_bytes_do_not_grow_with_depth():
    few, many = (kept_bytes(net_of(0.95, depth, use_backprop=False), rows(64)) for depth in (4, 16))
    assert few == many
    stored = kept_bytes(net_of(0.95, 16, use_backprop=True), rows(64))
    assert many < stored / 4


def test_frozen_and_unused_parameters():
    class Spare(Branch):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(2, 2)

    net = mfx.MomentumNet([Spare() for _ in range(3)], 0.8, use_backprop=False).double()
    net.functions[0].requires_grad_(False)
    net.functions[2].up.weight.requires_grad_(False)
    assert_same(run(net, rows()), run(Plain(net, True), rows()), 1e-9)


def test_two_backwards_and_two_forwards_before_one():
    net = net_of(use_backprop=False, p=0.0)
    x = rows()
    first, second = net(x), net(2 * x)
    loss = first.sum() * second.square().sum()
    one = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    two = torch.autograd.grad(loss, list(net.parameters()))
    plain = Plain(net, True)
    expected = torch.autograd.grad(plain(x).sum() * plain(2 * x).square().sum(), list(net.parameters()))
    assert relative_error(one, two) == 0
    assert relative_error(one, expected) < 1e-9


def test_copies_pickles_and_checkpoints():
    net = net_of(use_backprop=False).eval()
    net(rows()).sum().backward()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert (twin.gamma, twin.use_backprop, twin.is_residual) == (0.8, False, True)
        assert torch.equal(twin(rows()), net(rows()))
        twin.gamma = 0.5
        assert net.gamma == 0.8
    fresh = net_of(depth=4).eval()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(fresh(rows()), net(rows()))


def test_parameters_have_the_names_that_momentumnet_gives_them():
    net = mfx.MomentumNet([nn.Linear(2, 2), nn.Linear(2, 2)], 0.5, True, nn.Linear(2, 2))
    names = [f"network.{key}.{name}" for key in ("0", "1", "init") for name in ("weight", "bias")]
    assert list(net.state_dict()) == names


def test_its_attributes_are_those_of_momentumnet_and_can_be_set():
    functions, init = branches(3), nn.Linear(WIDTH, WIDTH)
    net = mfx.MomentumNet(nn.Sequential(*functions), 0.8, True, init).double()
    assert net.functions == functions
    assert net.init_function is init
    assert mfx.MomentumNet(functions, 0.5).init_function is None
    net.gamma, net.use_backprop, net.is_residual = 0.4, False, False
    assert_same(run(net, rows()), run(Plain(net, False), rows()), 1e-9)
    assert "gamma=0.4, use_backprop=False, is_residual=False" in repr(net)


@pytest.mark.parametrize("is_residual", [True, False])
def test_the_inverse_undoes_the_flow(is_residual):
    net = net_of(0.8, is_residual=is_residual).eval()
    side = torch.randn(5, WIDTH, dtype=torch.float64)
    x, v = rows(), torch.randn(5, WIDTH, dtype=torch.float64)
    again = net.inverse(*net.flow(x, v, side, factor=0.5), side, factor=0.5)
    assert relative_error(again, (x, v)) < 1e-11
    assert relative_error(net.flow(x, None, side)[0], net(x, side)) < 1e-12
    ours = torch.autograd.grad(net.flow(x)[0].sum(), list(net.parameters()))
    assert relative_error(ours, torch.autograd.grad(net(x).sum(), list(net.parameters()))) < 1e-9


def test_the_flow_starts_from_the_learned_velocity():
    net = net_of(init_speed=True, init_function=nn.Linear(WIDTH, WIDTH)).eval()
    end = net.flow(rows())
    assert relative_error(end[0], net(rows())) < 1e-12
    assert relative_error(net.inverse(*end)[1], net.init_function(rows())) < 1e-11


def test_gamma_can_be_set_annealed_and_the_drift_read():
    net = net_of(0.0, use_backprop=False)
    with pytest.raises(mfx.OptionError, match="one gamma for all"):
        mfx.set_gamma(net, {"*.0": 0.5, "*": 0.1})
    schedule = mfx.GammaSchedule(net, 0.0, 0.8, steps=2)
    schedule.step()
    assert net.gamma == 0.4
    net(rows()).sum().backward()
    assert mfx.drift(net)["momentum_0"] < 1e-12
    assert [chain.blocks for chain in mfx.chains(net)] == [("network.0", "network.1", "network.2", "network.3")]


def test_low_gamma_takes_snapshots_and_stays_exact():
    net = mfx.MomentumNet(branches(40), 0.2, use_backprop=False)
    stored = copy.deepcopy(net)
    stored.use_backprop = True
    x = torch.randn(5, WIDTH, requires_grad=True)
    assert_same(run(net, x), run(stored, x), 1e-4)
    assert len(net._mfx.chain.schedule(torch.float32).snapshots) > 1


def test_hidden_state_is_noticed():
    class Counts(nn.Linear):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            type(self).calls += 1
            return super().forward(x) * self.calls

    net = mfx.MomentumNet([Counts(WIDTH, WIDTH) for _ in range(3)], 0.8, use_backprop=False).double()
    with pytest.warns(mfx.DriftWarning, match="momentum_0"):
        net(rows()).sum().backward()


def test_an_inner_part_of_a_momentumized_model_runs_as_it_is():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(WIDTH, WIDTH)
            self.net = net_of(use_backprop=False)
            self.last = nn.Linear(WIDTH, WIDTH)
            self.double()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            x = self.net(x)
            return x + self.last(x)

    outer = Outer()
    mm = mfx.momentumize(outer, 0.0)
    assert_same(run(mm, rows()), run(outer, rows()))
    mfx.set_gamma(mm, {"net.*": 0.5, "*": 0.0})
    assert outer.net.gamma == 0.5
    assert_same(run(mm, rows()), run(outer, rows()), 1e-9)


def test_autocast_carries_the_state_one_precision_up():
    net = mfx.MomentumNet([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(24)], 0.7)
    x = torch.randn(5, WIDTH)

    def gradients(use_backprop: bool, enabled: bool) -> list[Tensor]:
        net.use_backprop = use_backprop
        with torch.autocast("cpu", torch.bfloat16, enabled):
            loss = net(x).square().sum()
        return list(torch.autograd.grad(loss, list(net.parameters())))

    exact, stored = gradients(True, False), gradients(True, True)
    assert relative_error(gradients(False, True), stored) < 2 * relative_error(stored, exact)


def test_distributed_data_parallel_sees_its_parameters(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = net_of(use_backprop=False)
        expected = run(net, rows())
        parallel = nn.parallel.DistributedDataParallel(net)
        torch.manual_seed(0)
        with torch.no_grad():
            weight = net.functions[0].up.weight.clone()
        found = run(parallel, rows())
        assert torch.equal(weight, net.functions[0].up.weight)
        assert relative_error(list(found.grads.values()), list(expected.grads.values())) < 1e-12
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("init", [False, True])
@pytest.mark.parametrize("is_residual", [True, False])
def test_compiled_it_is_one_graph_and_the_same(is_residual, init, backend):
    torch._dynamo.reset()
    given = {"init_speed": True, "init_function": nn.Linear(WIDTH, WIDTH)} if init else {}
    functions = branches(3, p=0.0)
    net = mfx.MomentumNet([*functions, functions[0]], 0.8, use_backprop=False, is_residual=is_residual, **given)
    net.double()
    side = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = run(net, rows(), side, factor=0.5)
    compiled = torch.compile(net, fullgraph=True, backend=backend)
    found = run(compiled, rows(), side, factor=0.5)
    assert relative_error(list(found.grads.values()), list(expected.grads.values())) < 1e-9
    assert relative_error(found.input_grads, expected.input_grads) < 1e-9
    assert relative_error(list(found.buffers.values()), list(expected.buffers.values())) < 1e-12
    net.eval()
    assert relative_error(compiled(rows(), side), net(rows(), side)) < 1e-12
    net.gamma = 0.2
    assert relative_error(compiled(rows(), side), net(rows(), side)) < 1e-12


def test_compiled_dropout_has_the_gradient_that_differences_say():
    torch._dynamo.reset()
    net = net_of(use_backprop=False)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x, direction = rows(), torch.randn(5, WIDTH, dtype=torch.float64)

    def loss(step: float) -> Tensor:
        torch.manual_seed(3)
        return compiled((x.detach() + step * direction).requires_grad_()).square().sum()

    torch.manual_seed(3)
    (gradient,) = torch.autograd.grad(compiled(x).square().sum(), x)
    differences = (loss(1e-6) - loss(-1e-6)).detach() / 2e-6
    assert float(((gradient * direction).sum() - differences).abs() / differences.abs()) < 1e-6


def test_compiled_it_keeps_as_little():
    def kept(depth: int) -> int:
        torch._dynamo.reset()
        net = torch.compile(net_of(0.95, depth, p=0.0, use_backprop=False), fullgraph=True, backend="aot_eager")
        x = rows(64)
        net(x)
        return mfx.kept_bytes(net, [x], lambda: net(x))[0]

    assert kept(12) == kept(4)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (([], 0.9), mfx.OptionError, "functions is empty"),
        (([torch.tanh], 0.9), mfx.InputTypeError, r"functions\[0\] must be a torch.nn.Module"),
        ((nn.Linear(2, 2), 0.9), mfx.InputTypeError, r"not one Linear: give \[module\]"),
        (([nn.Linear(2, 2)], 1.1), mfx.OptionError, r"gamma=1.1: .*\[-1, 1\]"),
        (([nn.Linear(2, 2)], -1.1), mfx.OptionError, "gamma=-1.1"),
        (([nn.Linear(2, 2)], float("nan")), mfx.OptionError, "gamma=nan"),
        (([nn.Linear(2, 2)], "0.9"), mfx.InputTypeError, "gamma must be a float"),
        (([nn.Linear(2, 2)], 0.9, True), mfx.OptionError, "init_function, which is None"),
        (([nn.Linear(2, 2)], 0.9, True, torch.tanh), mfx.InputTypeError, "init_function must be a torch.nn.Module"),
    ],
)
def test_bad_arguments_are_named(given, error, text):
    with pytest.raises(error, match=text):
        mfx.MomentumNet(*given)


@pytest.mark.parametrize("use_backprop", [True, False])
def test_a_function_that_changes_the_shape_is_named(use_backprop):
    x = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(
        mfx.ShapeError, match=r"network\.1 \(Linear\) returned shape \(3, 1\), but x has shape \(3, 2\)"
    ):
        mfx.MomentumNet([nn.Linear(2, 2), nn.Linear(2, 1)], 0.9, use_backprop=use_backprop)(x)
    with pytest.raises(mfx.ShapeError, match="returned tuple, not a tensor"):
        mfx.MomentumNet([nn.LSTM(2, 2)], 0.9, use_backprop=use_backprop)(x)
    with pytest.raises(mfx.ShapeError, match=r"v_0 has shape \(3, 1\), .*init_function"):
        mfx.MomentumNet([nn.Linear(2, 2)], 0.9, True, nn.Linear(2, 1), use_backprop)(x)


def test_lazy_functions_are_to_be_run_once_before():
    functions = [nn.Sequential(nn.LazyLinear(9), nn.Tanh(), nn.LazyLinear(WIDTH)) for _ in range(3)]
    net = mfx.MomentumNet(functions, 0.8, use_backprop=False)
    x = torch.randn(5, WIDTH, requires_grad=True)
    with pytest.raises(mfx.InputTypeError, match=r"'network\.0' has a lazy module .* run the model once"):
        net(x)
    with torch.no_grad():
        net(x)
    assert_same(run(net, x), run(Plain(net, True), x), 1e-4)


@pytest.mark.parametrize("kind", ["net", "model"])
def test_copies_for_data_parallel_are_refused(kind):
    model: Any = net_of(use_backprop=False) if kind == "net" else mfx.momentumize(Net(), 0.8).blocks
    with pytest.raises(mfx.InputTypeError, match="DistributedDataParallel"):
        model._replicate_for_data_parallel()(rows())


def test_a_velocity_of_another_shape_is_not_broadcast():
    torch._dynamo.reset()
    net = mfx.MomentumNet([nn.Linear(2, 2)], 0.9, True, nn.Linear(2, 1), use_backprop=False)
    x = torch.randn(3, 2, requires_grad=True)
    with pytest.raises(Exception, match=r"v_0 has shape \(3, 1\)"):
        torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    with pytest.raises(mfx.ShapeError, match=r"v_0 has shape \(2,\)"):
        net.inverse(x, torch.zeros(2))
    model = Net(2)
    mm = mfx.momentumize(model, 0.9, velocity=lambda chain: nn.Linear(6, 1).double())
    with pytest.raises(mfx.ShapeError, match=r"v_0 has shape \(5, 1\)"):
        mm(torch.randn(5, 4, dtype=torch.float64))
