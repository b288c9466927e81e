"""The precision planner: what it chooses, that measured errors stay under its bound, and that control is explicit."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import relative_error
from hypothesis import given
from hypothesis import strategies as st
from nets import Net, rows
from torch import Tensor, nn

import mfx
from mfx.model.conversion import momentum_of
from mfx.rule import Momentum, Schedule, schedule
from mfx.rule.arithmetic.precision import default_tolerance
from mfx.run.tape import observing
from mfx.torch_versions import has_float64

GAMMAS = (0.99, 0.9, 0.7, 0.5, 0.3, 0.1, 0.01, 0.0)
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64


class Plain(nn.Module):
    """x + f(x) without normalization, in PyTorch's initialization or Kaiming's (where x grows exponentially)."""

    def __init__(self, width: int, kaiming: bool = False) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(width, width), nn.ReLU() if kaiming else nn.Tanh(), nn.Linear(width, width))
        if kaiming:
            for layer in (self.f[0], self.f[2]):
                nn.init.kaiming_normal_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.f(x)


def gradients(mm: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(mm(x).square().mean(), list(mm.parameters()))


def gradient_error(network: nn.Module, gamma: float, x: Tensor, **options: object) -> float:
    found = gradients(mfx.momentumize(network, gamma=gamma, **options), x)
    return relative_error(found, gradients(mfx.momentumize(network, gamma=gamma, reversible=False, **options), x))


def plan(mm: nn.Module, dtype: torch.dtype = F32) -> Schedule:
    (chain,) = momentum_of(mm).latest()
    return chain.schedule(dtype)


@pytest.mark.parametrize("depth", [8, 100])
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("block", ["norm", "plain"])
def test_the_gradient_can_be_trusted(block, gamma, depth):
    assert _error(block, gamma, depth) <= (1e-5 if gamma == 0.9 and depth == 100 else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_gradient_can_be_trusted_at_great_depth(gamma):
    assert _error("norm", gamma, 300) <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("block", "gamma"), [("norm", 0.9), ("plain", 0.1)])
def test_the_gradient_can_be_trusted_at_a_depth_of_a_thousand(block, gamma):
    assert _error(block, gamma, 1000) <= 1e-3


def _error(block: str, gamma: float, depth: int) -> float:
    network = (Net(depth, 8, p=0.0) if block == "norm" else Net(depth, 8, Plain)).float()
    return gradient_error(network, gamma, rows().float())


@pytest.mark.parametrize("gamma", [0.9, 0.5, 0.1])
@pytest.mark.parametrize(("depth", "kaiming"), [(8, True), (30, False), (60, False)])
def test_float64_keeps_ten_digits(depth, kaiming, gamma):
    assert gradient_error(Net(depth, 8, Plain, kaiming=kaiming), gamma, rows()) <= 1e-10


@pytest.mark.parametrize(("gamma", "depth"), [(0.9, 40), (0.7, 20), (0.5, 12)])
def test_large_tensors_of_branches_that_amplify(gamma, depth):
    """With 65,536 elements some would round to another float32 in every step, if the state were not exact."""
    network = Net(depth, 16, Plain, kaiming=True).float()
    mm = mfx.momentumize(network, gamma=gamma, state_dtype=F64)
    assert plan(mm).exact
    x = torch.randn(4096, 4)
    assert gradient_error(network, gamma, x, state_dtype=F64) <= 1e-6
    gradients(mm, x)
    assert mfx.drift(mm) == {"momentum_0": 0.0}


def test_activations_that_explode_are_noticed():
    """x grows by a factor of 10^8 here, more than exact arithmetic has bits for."""
    mm = mfx.momentumize(Net(60, 16, Plain, kaiming=True).float(), gamma=0.5)
    with pytest.warns(mfx.DriftWarning, match="amplify errors more than planned for"):
        gradients(mm, torch.randn(512, 4))


class States:
    """Observes a chain's states, forward and as reconstructed."""

    def __init__(self) -> None:
        self.forward: dict[int, tuple[Tensor, Tensor | None]] = {}
        self.error = 0.0

    def __call__(self, chain: str, index: int, x: Tensor, v: Tensor | None) -> None:
        if index not in self.forward:
            self.forward[index] = (x.detach().clone(), None if v is None else v.detach().clone())
            return
        known_x, known_v = self.forward[index]
        self.error = max(self.error, relative_error([x], [known_x]))
        if v is not None and known_v is not None:
            largest = max(float(old.norm()) for _, old in self.forward.values() if old is not None)
            self.error = max(self.error, float((v - known_v).norm()) / largest)


@pytest.mark.parametrize("kaiming", [False, True])
@pytest.mark.parametrize("gamma", [0.99, 0.9, 0.7, 0.5, 0.3, 0.1])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_measured_error_stays_under_the_bound(dtype, gamma, kaiming):
    """As deep as floating arithmetic goes without a snapshot: there the bound is largest."""
    tolerance = default_tolerance(dtype)
    depths = [n for n in range(2, 150) if not (found := schedule((Momentum(gamma),) * n, dtype, dtype)).snapshots]
    depth = max(n for n in depths if not schedule((Momentum(gamma),) * n, dtype, dtype).exact)
    mm = mfx.momentumize(Net(depth, 16, Plain, kaiming=kaiming).to(dtype), gamma=gamma, state_dtype=dtype)
    found = plan(mm, dtype)
    assert not found.exact
    assert 0 < found.drift <= tolerance
    states = States()
    with observing(states):
        gradients(mm, torch.randn(64, 4, dtype=dtype))
    assert 0 < states.error <= 2 * found.drift, "the observer's error is relative to each x, not to the largest"
    assert mfx.drift(mm)["momentum_0"] <= tolerance


@pytest.mark.parametrize("depth", [30, 100, 200])
@pytest.mark.parametrize("gamma", [0.99, 0.9, 0.5, 0.1])
def test_the_forward_is_rounded_less_than_planned(gamma, depth):
    """Against the same recurrence in float64 throughout, where the branches compute alike."""
    found = schedule((Momentum(gamma),) * depth, F32)
    assert found.rounding <= 1e-5
    network = Net(depth, 8, Plain).float()
    x = torch.randn(64, 4)
    mm = mfx.momentumize(network, gamma=gamma)
    with torch.no_grad():
        state = network.stem(x).double()
        v = torch.zeros_like(state)
        for block in network.blocks:
            v = gamma * v + (1 - gamma) * block.f(state.float()).double()
            state = state + v
        error = (mm(x) - network.head(state.float())).norm() / network.head(state.float()).norm()
    assert error <= 10 * max(found.rounding, 1e-6)


@pytest.mark.parametrize("gamma", [0.9, 0.95, 0.99, 0.999])
def test_two_tensors_a_chain_up_to_depth_200(gamma):
    for depth in (8, 50, 100, 150, 200):
        found = schedule((Momentum(gamma),) * depth, F32)
        assert found.state_count(depth) == 2, "x_N and v_N"
        assert found.bytes_an_element(depth) <= 16


def test_gamma_zero_is_checkpointing():
    for dtype in (F32, F64, BF16, F16):
        found = schedule((Momentum(0.0),) * 10, dtype)
        assert found.snapshots == tuple(range(10))
        assert found.state_count(10) == 10
        assert found.state_dtype == dtype
        assert not any(found.keeps_velocity(step) for step in range(10))
    near = schedule((Momentum(1e-9),) * 10, F32)
    assert near.snapshots == tuple(range(10)), "near 0 it is the cheapest"


def test_a_gamma_of_zero_in_the_middle_ends_a_run():
    found = schedule(tuple(map(Momentum, (0.9, 0.9, 0.0, 0.9, 0.9))), F64)
    assert found.snapshots == (2,)
    assert found.keeps_velocity(2)
    assert gradient_error(Net(5, 8, p=0.0), {"blocks.2": 0.0, "*": 0.9}, rows()) <= 1e-10


@given(
    st.lists(st.sampled_from(GAMMAS), min_size=1, max_size=60),
    st.sampled_from([F16, BF16, F32, F64]),
    st.sampled_from([None, 1e-2, 1e-6]),
    st.sampled_from(["auto", F32, F64]),
)
def test_every_plan_can_be_run(gammas, dtype, tolerance, state):
    """Each division lies within a run; the error and the rounding are under the tolerance; auto is cheapest."""
    found = schedule(tuple(map(Momentum, gammas)), dtype, state, tolerance)
    steps = len(gammas)
    assert list(found.snapshots) == sorted(set(found.snapshots))
    assert all(step in found.snapshots for step, gamma in enumerate(gammas) if step and gamma == 0)
    assert found.drift <= found.tolerance
    assert found.rounding <= found.tolerance
    assert found.state_count(steps) <= max(steps, 2)
    assert torch.promote_types(found.state_dtype, dtype) == found.state_dtype
    if state == "auto":
        for other in (F32, F64):
            asked = schedule(tuple(map(Momentum, gammas)), dtype, other, tolerance)
            if other in (dtype, found.state_dtype):
                assert found.bytes_an_element(steps) <= asked.bytes_an_element(steps)


@given(
    st.lists(st.sampled_from(GAMMAS), min_size=2, max_size=40),
    st.sampled_from([F16, BF16, F32]),
    st.sampled_from([None, 1e-2, 1e-6]),
    st.sampled_from([None, BF16]),
    st.sets(st.integers(1, 39)),
)
def test_a_device_without_float64_is_never_given_it(gammas, dtype, tolerance, compute, cuts):
    rules, at = tuple(map(Momentum, gammas)), tuple(sorted(cut for cut in cuts if cut < len(gammas)))
    found = schedule(rules, dtype, "auto", tolerance, compute, at, float64=False)
    assert found.state_dtype in (F32, BF16, F16)
    assert found.drift <= found.tolerance
    assert set(at) <= set(found.snapshots)
    with pytest.raises(mfx.OptionError, match=r"no float64.*state_dtype=.auto"):
        schedule(rules, dtype, F64, tolerance, compute, at, float64=False)


def test_mps_has_no_float64_and_the_run_asks_the_device_of_the_input(monkeypatch):
    assert has_float64(torch.device("cpu"))
    assert has_float64(torch.device("cuda"))
    assert not has_float64(torch.device("mps"))
    asked = []
    monkeypatch.setattr("mfx.run.chain.has_float64", lambda device: bool(asked.append(device)))
    network = Net(60, 8, p=0.0).float()
    assert plan(mfx.momentumize(network, gamma=0.9)).state_dtype == F64
    began = []
    with observing(lambda *_: None, lambda chain, plan: began.append(plan)):
        assert gradient_error(network, 0.9, rows().float()) <= 1e-4
    assert began[0].state_dtype == F32
    assert began[0].snapshots
    assert asked == [torch.device("cpu")] * 2
    with pytest.raises(mfx.OptionError, match="no float64"):
        mfx.momentumize(network, gamma=0.9, state_dtype=F64)(rows().float())


@pytest.mark.parametrize("gamma", [0.99, 0.9, 0.5, 0.0])
def test_a_cut_begins_a_run(gamma):
    """What is kept at cuts restarts the error, so that a chain may do with its own dtype and no more snapshots."""
    rules = (Momentum(gamma),) * 40
    whole, cut = schedule(rules, F32), schedule(rules, F32, cuts=(10, 20, 30))
    assert set(cut.snapshots) >= {10, 20, 30}
    if gamma == 0.9:
        assert (whole.state_dtype, cut.state_dtype) == (F64, F32)
        assert cut.snapshots == (10, 20, 30)
    every = schedule(rules, F32, cuts=tuple(range(1, 40)))
    assert (every.state_dtype, every.state_count(40)) == (F32, 40), "each x, and no v"


def test_growth():
    assert Momentum(1.0 - 1e-12).growth(0.0) == pytest.approx(1.0, abs=1e-5)
    for gamma, gain in itertools.product((0.1, 0.5, 0.9), (0.0, 0.5, 1.0, 3.0)):
        found = Momentum(gamma).growth(gain)
        matrix = torch.tensor([[1.0, -1.0], [-(1 - gamma) * gain / gamma, (1 + (1 - gamma) * gain) / gamma]])
        assert found == pytest.approx(float(torch.linalg.eigvals(matrix.double()).abs().max()), rel=1e-6)


# explicit control


def test_state_dtype_is_obeyed():
    network = Net(60, 8, p=0.0).float()
    for state in (F32, F64):
        mm = mfx.momentumize(network, gamma=0.9, state_dtype=state)
        assert plan(mm).state_dtype == state
        assert gradient_error(network, 0.9, rows().float(), state_dtype=state) <= 1e-4


def test_a_smaller_tolerance_costs_more_and_errs_less():
    network = Net(12, 8, Plain, kaiming=True).float()
    loose, tight = ({"state_dtype": F32, "tolerance": value} for value in (1e-2, 1e-6))
    few, many = (plan(mfx.momentumize(network, gamma=0.5, **given)) for given in (loose, tight))
    assert few.state_count(12) < many.state_count(12)
    assert many.drift <= 1e-6 < few.drift <= 1e-2
    x = torch.randn(64, 4)
    assert gradient_error(network, 0.5, x, **tight) < gradient_error(network, 0.5, x, **loose)


def test_the_plan_can_be_read_everywhere():
    network = Net(300, 4, p=0.0).float()
    mm = mfx.momentumize(network, gamma=0.9)
    found = plan(mm)
    assert found.interval(300) < 300
    (node,) = [node for node in mfx.graph_of(mm).nodes if node.name == "momentum_0"]
    for text in ("gamma 0.9", "300 steps", "float64", f"at most {found.interval(300)} steps to a snapshot (1 kept)"):
        assert text in node.kwargs["plan"]
        assert text in str(mfx.graph_of(mm))
    report = mfx.report(network, rows().float(), gamma=0.9)
    (row,) = report.chains
    assert (row.state_dtype, row.snapshots, row.interval) == ("float64", found.snapshots, found.interval(300))
    assert (row.drift, row.rounding, row.tolerance) == (0.0, found.rounding, 1e-4)
    assert row.state_bytes == 4 * 8 * 5 * 4
    assert f"{row.interval} steps apart" in str(report)
    assert report.to_dict()["chains"][0]["break_even"] == row.break_even


def test_break_even():
    network = Net(2, 8, Plain).float()
    (row,) = mfx.report(network, rows().float(), gamma=0.9).chains
    assert row.pays is (row.break_even <= 2)
    (row,) = mfx.report(Net(40, 8, Plain).float(), rows().float(), gamma=0.9).chains
    assert row.pays
    assert row.break_even < 40


def test_the_report_follows_autocast():
    network = Net(24, 8, p=0.0).float()
    with torch.autocast("cpu", BF16):
        (row,) = mfx.report(network, rows().float(), gamma=0.9).chains
    assert (row.state_dtype, row.tolerance) == ("float32", 1e-2)
