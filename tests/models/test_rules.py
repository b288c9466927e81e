"""Every rule, readout and granularity against recurrences written by hand; batch norm and dropout alive, float64."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from by_rule import TOLERANCE, ByRule, Net, both, named_as_the_net, x_of
from helpers import assert_same, chain_names, relative_error, run
from torch import Tensor, nn

import mfx


@dataclass(frozen=True)
class Own(mfx.Rule):
    """A rule of a user's own."""

    strength: float

    @property
    def decay(self) -> float:
        return 0.6

    @property
    def pull(self) -> float:
        return self.strength


RULES: dict[str, tuple[dict[str, Any], float, float]] = {
    "momentum": ({"gamma": 0.7}, 0.7, 0.3),
    "gamma below 0": ({"gamma": -0.6}, -0.6, 1.6),
    "gamma -1": ({"gamma": -1.0}, -1.0, 2.0),
    "midpoint": ({"rule": "midpoint"}, -1.0, 2.0),
    "leapfrog": ({"rule": "leapfrog", "h": 0.4}, 1.0, 0.4**2),
    "leapfrog of 1": ({"rule": "leapfrog"}, 1.0, 1.0),
    "an object": ({"rule": mfx.Leapfrog(0.3)}, 1.0, 0.3**2),
    "one's own": ({"rule": Own(0.8)}, 0.6, 0.8),
}
EVERY = pytest.mark.parametrize(("options", "decay", "pull"), RULES.values(), ids=RULES)
READ = {name: rule for name, rule in RULES.items() if rule[1] != 1}
FEW = pytest.mark.parametrize(("options", "decay", "pull"), [RULES["gamma below 0"], RULES["leapfrog"]], ids=str)


@EVERY
@pytest.mark.parametrize("granularity", ["add", "layer"])
def test_a_rule_is_its_recurrence(options: dict, decay: float, pull: float, granularity: str) -> None:
    net, whole = Net(taps=(1,)).double(), granularity == "layer"
    # Carried on a grid, other decays than 1 and -1 move the forward itself, by less than the tolerance of 1e-10.
    tolerance = 1e-10 if abs(decay) == 1 else TOLERANCE
    mm = both(net, {**options, "granularity": granularity}, ByRule(net, (decay, pull), whole=whole), tolerance)
    assert [len(chain) for chain in chain_names(mm)] == [4 if whole else 8]


@FEW
def test_captured_by_dynamo_it_is_the_same(options: dict, decay: float, pull: float) -> None:
    net = Net(taps=(1,)).double()
    both(net, {**options, "capture": "dynamo", "granularity": "layer"}, ByRule(net, (decay, pull), whole=True))


@pytest.mark.parametrize(("options", "decay", "pull"), READ.values(), ids=READ)
@pytest.mark.parametrize("taps", [(), (0, 2)], ids=["end", "taps"])
def test_z_is_read_at_the_end_and_at_taps(options: dict, decay: float, pull: float, taps: tuple[int, ...]) -> None:
    net = Net(taps=taps).double()
    both(net, {**options, "readout": "z"}, ByRule(net, (decay, pull), coast=decay / (1 - decay)))


@pytest.mark.parametrize("readout", ["x", "z"])
def test_the_first_block_acts_like_the_plain_one_where_that_is_asked_for(readout: str) -> None:
    net = Net().double()
    hand = ByRule(net, (-1.0, 2.0), first=True, coast=-0.5 if readout == "z" else 0.0)
    both(net, {"rule": "midpoint", "velocity": "first", "readout": readout}, hand)


def test_z_of_gammas_that_differ_goes_by_the_step_before_it() -> None:
    net, gammas = Net(taps=(0, 1)).double(), [0.3, 0.3, 0.9, 0.9, 0.5, 0.5, 0.7, 0.7]
    mapping = {f"layers.{layer}#*": gammas[2 * layer] for layer in range(4)}
    hand = ByRule(net, lambda k: (gammas[k], 1 - gammas[k]), coast=lambda k: gammas[k] / (1 - gammas[k]))
    both(net, {"gamma": mapping, "readout": "z"}, hand)


class Sided(Net):
    """A later layer reads the state after the first one, which is handed out as well."""

    def forward(self, x: Tensor) -> list[Tensor]:
        first, *others = self.layers
        early = x = first(x)
        for layer in others:
            x = x + layer.attend(x)
            x = x + layer.feed(x * early)
        return [self.head(x), early]


@pytest.mark.parametrize("readout", ["x", "z"])
def test_blocks_themselves_always_read_x(readout: str) -> None:
    net = Sided().double()
    c = 0.8 / 0.2 if readout == "z" else 0.0

    class Hand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> list[Tensor]:
            v, early, tap = torch.zeros_like(x), x, x
            for index, layer in enumerate(net.layers):
                v = 0.8 * v + 0.2 * layer.attend(x)
                x = x + v
                v = 0.8 * v + 0.2 * layer.feed(x * early if index else x)
                x = x + v
                if index == 0:
                    early, tap = x, x + c * v
            return [net.head(x + c * v), tap]

    both(net, {"gamma": 0.8, "readout": readout}, Hand())  # type: ignore[arg-type]


def test_what_is_read_out_may_be_written_to() -> None:
    class Writes(Net):
        def forward(self, x: Tensor) -> list[Tensor]:
            for layer in self.layers:
                x = layer(x)
            return [self.head(x.mul_(2.0))]

    class Hand(ByRule):
        def forward(self, x: Tensor) -> list[Tensor]:
            head, self.net.head = self.net.head, nn.Identity()
            (out,) = super().forward(x)
            self.net.head = head
            return [head(2.0 * out)]

    net = Writes().double()
    both(net, {"gamma": 0.5, "readout": "z"}, Hand(net, (0.5, 0.5), coast=1.0))


@FEW
@pytest.mark.parametrize("readout", ["x", "z"])
def test_compiled_it_is_the_same(options: dict, decay: float, pull: float, readout: str) -> None:
    if readout == "z" and decay == 1:
        pytest.skip("nothing comes to rest")
    torch._dynamo.reset()
    net = Net(taps=(1,)).double()
    net.layers.apply(lambda module: setattr(module, "p", 0.0) if isinstance(module, nn.Dropout) else None)
    x, coast = x_of(net), decay / (1 - decay) if readout == "z" else 0.0
    mm = mfx.momentumize(net, readout=readout, **options)
    compiled = torch.compile(mm, backend="aot_eager", fullgraph=True)
    found, wanted = run(compiled, x), named_as_the_net(run(ByRule(net, (decay, pull), coast=coast), x))
    assert relative_error(found.outputs, wanted.outputs) < TOLERANCE
    assert relative_error(list(found.grads.values()), list(wanted.grads.values())) < TOLERANCE


def test_layers_are_compiled_as_layers() -> None:
    torch._dynamo.reset()
    net = Net().double().eval()
    mm = mfx.momentumize(net, 0.8, granularity="layer")
    compiled = torch.compile(mm, backend="aot_eager", fullgraph=True)
    x = x_of(net)
    assert relative_error(compiled(x), ByRule(net, (0.8, 0.2), whole=True)(x)) < TOLERANCE


@EVERY
def test_a_chain_of_any_rule_runs_backwards_in_closed_form(options: dict, decay: float, pull: float) -> None:
    net = Net().double().eval()
    chain = mfx.chains(mfx.momentumize(net, **options))[0]
    x, v = x_of(net).detach(), 0.1 * x_of(net).detach()
    again, start = chain.inverse(*chain.forward(x, v))
    assert relative_error(again, x) < 1e-10
    assert relative_error(start, v) < 1e-9


@EVERY
@pytest.mark.parametrize("use_backprop", [True, False])
def test_a_momentumnet_takes_every_rule(options: dict, decay: float, pull: float, use_backprop: bool) -> None:
    torch.manual_seed(0)
    functions = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)).double() for _ in range(5)]
    net = mfx.MomentumNet(functions, use_backprop=use_backprop, **options)
    x = x_of(net)

    def by_hand(x: Tensor) -> Tensor:
        v = torch.zeros_like(x)
        for function in functions:
            v = decay * v + pull * function(x)
            x = x + v
        return x

    torch.manual_seed(1)
    expected = torch.autograd.grad(by_hand(x).square().sum(), [x, *net.parameters()])
    torch.manual_seed(1)
    found = torch.autograd.grad(net(x).square().sum(), [x, *net.parameters()])
    assert relative_error(list(found), list(expected)) < TOLERANCE
    assert net.network["0"] is functions[0]


class Streams(nn.Module):
    """Two streams that read each other in every layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.joint = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for joint in self.joint:
            p, q = self.drop(torch.tanh(joint(torch.cat([x, y], -1)))).chunk(2, -1)
            x, y = x + p, y + q
        return torch.cat([x, y], -1)


@EVERY
def test_streams_that_read_each_other_take_every_rule(options: dict, decay: float, pull: float) -> None:
    net = Streams().double()
    x, y = x_of(net), x_of(net).detach().roll(1, 0).requires_grad_()
    mm = mfx.momentumize(net, example_inputs=(x, y), **options)

    class Hand(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.joint, self.drop = net.joint, net.drop

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            state, v = torch.cat([x, y], -1), torch.zeros(len(x), 12, dtype=x.dtype)
            for joint in self.joint:
                v = decay * v + pull * self.drop(torch.tanh(joint(state)))
                state = state + v
            return state

    assert [len(names) for names in chain_names(mm)] == [4]
    assert_same(run(mm, x, y), run(Hand(), x, y), TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{"rule": "midpoint"}, {"rule": "leapfrog", "h": 0.05}], ids=str)
def test_a_thousand_blocks_keep_two_states_and_no_snapshot(dtype: torch.dtype, options: dict) -> None:
    """The reversible gradient is that of the stored run of the same recurrence."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Tanh()) for _ in range(1000)]
    blocks = [block.to(dtype) for block in blocks]
    for block in blocks:
        block[1].weight.data.mul_(0.1)
    x = torch.randn(4, 8).to(dtype)

    def gradients(stored: bool) -> tuple[Tensor, list[Tensor], mfx.MomentumNet]:
        net = mfx.MomentumNet(blocks, use_backprop=stored, **options)
        out = net(x)
        return out.detach(), list(torch.autograd.grad(out.float().square().mean(), net.parameters())), net

    out, found, net = gradients(False)
    expected_out, expected, _ = gradients(True)
    spec = net.__dict__["_mfx"].latest()[0]
    plan = spec.schedule(dtype, None, float64=True)
    assert plan.snapshots == ()
    assert plan.state_count(1000) == 2
    assert mfx.drift(net)["momentum_0"] == 0.0
    assert torch.equal(out, expected_out)
    assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 2e-2)


def test_a_copy_and_a_pickle_run_by_the_same_rule() -> None:
    net = Net().double().eval()
    mm = mfx.momentumize(net, rule="midpoint", readout="z", granularity="layer")
    x = x_of(net)
    wanted = ByRule(net, (-1.0, 2.0), whole=True, coast=-0.5)(x)[0]
    for copied in (mm, copy.deepcopy(mm), pickle.loads(pickle.dumps(mm))):
        assert relative_error(copied(x)[0], wanted) < TOLERANCE


@pytest.mark.parametrize("rule", ["midpoint", mfx.Leapfrog(0.5)], ids=str)
def test_a_rule_without_gamma_has_none_that_could_be_set(rule: Any) -> None:
    mm = mfx.momentumize(Net(), rule=rule)
    with pytest.raises(mfx.OptionError, match="has no gamma that could be set"):
        mfx.set_gamma(mm, 0.5)
    with pytest.raises(mfx.OptionError, match="has no gamma that could be set"):
        mfx.set_gamma(mfx.MomentumNet([nn.Linear(3, 3)], rule=rule), 0.5)


def test_verify_holds_every_rule_against_the_original_and_its_stored_run() -> None:
    net = Net().double()
    for options in ({"rule": "midpoint"}, {"rule": "leapfrog", "h": 0.2}, {"gamma": -0.4, "readout": "z"}):
        assert mfx.verify(net, x_of(net), granularity="layer", **options).ok, options
    model = Net().double()
    x = x_of(net)
    zero = mfx.momentumize(model, 0.0, granularity="layer", readout="z", example_inputs=x)
    assert_same(run(zero, x), run(model, x))
