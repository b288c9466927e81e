"""M5, M15: what hooks and modules keep of a branch is part of the graph, or somebody says that it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import relative_error
from nets import Net, rows
from recurrence import NetByHand
from torch import Tensor, nn

import mfx


class Mixed(nn.Module):
    """x + b(drop(norm(a(x)))), with dropout and BatchNorm alive."""

    def __init__(self, width: int, p: float = 0.2) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(width, width), nn.BatchNorm1d(width), nn.Linear(width, width)
        self.drop = nn.Dropout(p)

    def branch(self, x: Tensor) -> Tensor:
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


class Router(Mixed):
    """Keeps a loss of its own, a list of features that grows, and a value without a history."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.features: list[Tensor] = []
        self.losses: dict[str, Tensor] = {}

    def branch(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.balance = y.softmax(-1).square().mean()
        self.features.append(y.sin())
        self.losses["z"] = y.logsumexp(-1).square().mean()
        self.seen = y.detach()
        return self.b(self.drop(torch.tanh(self.norm(y))))


def steps(model: Net, gamma: float, loss: Callable[[Tensor], Tensor], **options: Any) -> list[list[Tensor | None]]:
    """The gradients of x and all parameters from the reversible run, and from the recurrence by hand."""
    found = []
    for each in (mfx.momentumize(model, gamma, **options), NetByHand(model, gamma)):
        for buffer in model.buffers():
            buffer.zero_()
        x = torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(5, 4).requires_grad_()
        torch.manual_seed(1)
        found.append(list(torch.autograd.grad(loss(each(x)), [x, *model.parameters()], allow_unused=True)))
    return found


KEPT = {
    "output": lambda module, kept: module.register_forward_hook(lambda m, args, out: kept.append(out)),
    "input": lambda module, kept: module.register_forward_pre_hook(lambda m, args: kept.append(args[0])),
    "both": lambda module, kept: module.register_forward_hook(lambda m, args, out: kept.extend([args[0], out])),
    "by keyword": lambda module, kept: module.register_forward_hook(
        lambda m, args, kwargs, out: kept.append(out), with_kwargs=True
    ),
}


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("whole", [None, "blocks.?"])
@pytest.mark.parametrize("part", ["a", "norm", "drop", "b"])
@pytest.mark.parametrize("keep", KEPT)
def test_a_loss_on_what_a_hook_kept(keep: str, part: str, whole: Any, gamma: float):
    model, kept = Net(block=Mixed), []
    KEPT[keep](getattr(model.blocks[1], part), kept)

    def loss(out: Tensor) -> Tensor:
        values, _ = list(kept), kept.clear()
        assert len(values) == (2 if keep == "both" else 1)
        return out.square().sum() + sum(value.sin().sum() for value in values)

    ours, theirs = steps(model, gamma, loss, modules=whole)
    assert [g is None for g in ours] == [g is None for g in theirs]
    assert relative_error(ours, theirs) < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("whole", [None, "blocks.?"])
def test_a_loss_on_what_hooks_kept_alone(whole: Any, gamma: float):
    """Distillation: the features of two blocks, and not the output."""
    model, kept = Net(block=Mixed), []
    for block in (model.blocks[0], model.blocks[2]):
        block.a.register_forward_hook(lambda m, args, out: kept.append(out))

    def loss(out: Tensor) -> Tensor:
        values, _ = list(kept), kept.clear()
        return sum(value.square().sum() for value in values)

    ours, theirs = steps(model, gamma, loss, modules=whole)
    assert [g is None for g in ours] == [g is None for g in theirs]
    assert relative_error(ours, theirs) < 1e-10


def test_a_hook_that_looks_runs_once_a_step_and_one_that_changes_the_value_runs_again():
    model, calls = Net(block=Mixed, p=0.0), []
    model.blocks[1].a.register_forward_hook(lambda *_: calls.append("looks"))
    model.blocks[1].a.register_forward_hook(lambda m, args, out: calls.append("changes") or 2 * out)
    ours, theirs = steps(model, 0.8, lambda out: out.sum())
    assert relative_error(ours, theirs) < 1e-10
    assert sorted(calls) == ["changes"] * 3 + ["looks"] * 2, "the recurrence by hand calls each once"


def test_a_hook_that_is_removed_before_backward():
    model, kept = Net(block=Mixed), []

    def loss(out: Tensor) -> Tensor:
        handle.remove()
        return out.sum() + kept.pop().square().sum()

    found = []
    for each in (mfx.momentumize(model, 0.8), NetByHand(model, 0.8)):
        handle = model.blocks[1].a.register_forward_hook(lambda m, args, out: kept.append(out))
        torch.manual_seed(1)
        found.append(torch.autograd.grad(loss(each(rows().detach() * 0 + 1)), list(model.parameters())))
    assert relative_error(*found) < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("way", ["balance", "features", "losses"])
def test_an_auxiliary_loss_that_a_block_keeps(way: str, gamma: float):
    model = Net(block=Router)

    def loss(out: Tensor) -> Tensor:
        found = {
            "balance": [block.balance for block in model.blocks],
            "features": [block.features.pop() for block in model.blocks],
            "losses": [block.losses["z"] for block in model.blocks],
        }
        assert all(not block.features and not block.seen.requires_grad for block in model.blocks)
        return out.square().sum() + sum(value.square().sum() for value in found[way])

    ours, theirs = steps(model, gamma, loss, modules="blocks.?")
    assert relative_error(ours, theirs) < 1e-10


def test_what_a_block_kept_is_the_value_of_the_forward_after_the_backward_too():
    model = Net(block=Router)
    mm = mfx.momentumize(model, 0.8, modules="blocks.?")
    loss = mm(rows()).sum()
    before = [(block.balance, list(block.features), block.losses["z"], block.seen) for block in model.blocks]
    loss.backward()
    for block, (balance, features, z, seen) in zip(model.blocks, before, strict=True):
        assert block.balance is balance
        assert len(block.features) == 1
        assert block.features[0] is features[0]
        assert block.losses["z"] is z
        assert block.seen is seen


def test_an_auxiliary_loss_of_the_functions_of_a_momentum_net():
    functions = [Router(6).double() for _ in range(3)]
    x, found = torch.randn(5, 6, dtype=torch.float64), []
    for stored in (False, True):
        net = mfx.MomentumNet(functions, 0.8, use_backprop=stored, is_residual=False)
        torch.manual_seed(1)
        loss = net(x).square().sum() + sum(function.balance for function in functions)
        found.append(torch.autograd.grad(loss, list(net.parameters())))
    assert relative_error(*found) < 1e-10


class Weights(nn.Module):
    """Hands out a value from inside its branch, as attention does its weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score, self.value = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.score(x).softmax(-1)
        return x + self.value(x) * weights, weights


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Weights(6) for _ in range(3))
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        weights = []
        for block in self.blocks:
            x, each = block(x)
            weights.append(each)
        return x, weights


class Lends(nn.Module):
    """A later block reads what a hook keeps of an earlier one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        lent = self.one(x)
        x = x + lent.tanh()
        return x + self.two(x) * lent


@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_what_a_hook_kept_may_be_read_by_a_later_block(gamma: float):
    model, x, found = Lends(), torch.randn(5, 6, dtype=torch.float64, requires_grad=True), []
    for each in (mfx.momentumize(model, gamma), None):
        kept: list[Tensor] = []
        handle = model.one.register_forward_hook(lambda m, args, out, kept=kept: kept.append(out))
        if each is None:
            lent = model.one(x)
            v = (1 - gamma) * lent.tanh()
            out = x + v
            out = out + gamma * v + (1 - gamma) * model.two(out) * lent
        else:
            out = each(x)
        handle.remove()
        loss = out.square().sum() + kept[0].sin().sum()
        found.append(torch.autograd.grad(loss, [x, *model.parameters()]))
    assert relative_error(*found) < 1e-10


class Reshapes(Mixed):
    """Its modules give views, and it keeps one."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.a = nn.Sequential(nn.Linear(width, width), nn.Unflatten(-1, (2, width // 2)))
        self.norm = nn.Sequential(nn.Flatten(1), nn.BatchNorm1d(width))
        self.heads: list[Tensor] = []

    def branch(self, x: Tensor) -> Tensor:
        y = self.a(x)
        self.heads[:] = [y.transpose(1, 2)]
        return self.b(self.drop(torch.tanh(self.norm(self.heads[0].transpose(1, 2)))))


def gradients(model: Net, gamma: float, kept: list[Tensor], ask: Callable[[Tensor], Any], **options: Any) -> list[Any]:
    """What ``ask(output)`` gives of the reversible run, and of the recurrence by hand."""
    found = []
    for each in (mfx.momentumize(model, gamma, **options), NetByHand(model, gamma)):
        for buffer in model.buffers():
            buffer.zero_()
        kept.clear()
        torch.manual_seed(1)
        found.append(ask(each(torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(5, 4))))
    return found


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("whole", [None, "blocks.?"])
@pytest.mark.parametrize("part", ["a", "norm", "drop", "b"])
@pytest.mark.parametrize("keep", KEPT)
def test_the_gradient_by_what_hooks_kept_is_whole(keep: str, part: str, whole: Any, gamma: float, alone: bool):
    """That of a block's input too, whose rest is not in the branch."""
    model, kept = Net(block=Mixed), []
    for block in model.blocks:
        KEPT[keep](getattr(block, part), kept)

    def ask(out: Tensor) -> list[Tensor]:
        loss = out.square().sum() + (0 if alone else sum(value.sin().sum() for value in kept[1:]))
        return list(torch.autograd.grad(loss, [*kept, *model.parameters()]))

    ours, theirs = gradients(model, gamma, kept, ask, modules=whole)
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("gamma", [0.0, 0.8])
def test_the_gradient_by_views_that_hooks_or_modules_kept_is_whole(gamma: float):
    model, kept = Net(block=Reshapes), []
    for block in model.blocks:
        block.a.register_forward_hook(lambda m, args, out: kept.append(out))
        block.norm.register_forward_pre_hook(lambda m, args: kept.append(args[0]))

    def ask(out: Tensor) -> list[Tensor]:
        values = [*kept, *(block.heads[0] for block in model.blocks)]
        assert len(values) == 9
        loss = out.square().sum() + sum(value.sin().sum() for value in values)
        return list(torch.autograd.grad(loss, [*values, *model.parameters()]))

    ours, theirs = gradients(model, gamma, kept, ask, modules="blocks.?")
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_a_loss_on_a_view_that_a_hook_kept_alone():
    model, kept = Net(block=Reshapes), []
    model.blocks[1].a.register_forward_hook(lambda m, args, out: kept.append(out))

    def ask(out: Tensor) -> list[Tensor]:
        del out
        return list(torch.autograd.grad(kept[0].sin().sum(), list(model.stem.parameters())))

    assert relative_error(*gradients(model, 0.8, kept, ask, modules="blocks.?")) < 1e-9


ASKS: dict[str, Callable[[Tensor], Any]] = {
    "retain_grad": lambda value: value.retain_grad(),
    "register_hook": lambda value: value.register_hook(lambda grad: None),
}


@pytest.mark.parametrize("way", ASKS)
def test_a_forward_hook_that_asks_for_the_gradient_at_once_is_told_to_wait(way: str):
    """There is no history yet; where the branch is no whole module torch says so itself."""
    model, kept = Net(block=Mixed), []
    model.blocks[1].norm.register_forward_hook(lambda m, args, out: ASKS[way](out))
    with pytest.raises(mfx.BackwardError, match=r"hook of BatchNorm1d calls retain_grad.*after the model has run"):
        gradients(model, 0.8, kept, lambda out: None, modules="blocks.?")
    with pytest.raises(RuntimeError, match="require"):
        gradients(model, 0.8, kept, lambda out: None)


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("whole", [None, "blocks.?"])
def test_a_hook_that_writes_to_what_it_sees(whole: Any, gamma: float):
    model, kept = Net(block=Mixed), []
    model.blocks[1].b.register_forward_hook(lambda m, args, out: [out.mul_(3)].clear())

    def ask(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.square().sum(), list(model.parameters())))

    assert relative_error(*gradients(model, gamma, kept, ask, modules=whole)) < 1e-9


class Late(Mixed):
    """A module sees a value only after another that is computed from it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.mix, self.act = nn.Bilinear(width, width, width), nn.Tanh()

    def branch(self, x: Tensor) -> Tensor:
        early = self.a(x).sin()
        return self.b(self.drop(self.mix(early, self.act(early.cos()))))


@pytest.mark.parametrize("whole", [None, "blocks.?"])
def test_a_value_that_is_seen_after_one_that_is_computed_from_it(whole: Any):
    """In whole modules it is seen which was first; elsewhere it is an error if both matter, and right if not."""
    model, kept = Net(block=Late), []
    model.blocks[1].act.register_forward_hook(lambda m, args, out: kept.append(out))
    model.blocks[1].mix.register_forward_pre_hook(lambda m, args: kept.append(args[0]))

    def ask(out: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(out.square().sum(), [*kept, *model.blocks[1].a.parameters()]))

    def ask_both(out: Tensor) -> list[Tensor]:
        loss = out.square().sum() + kept[0].exp().sum()
        return list(torch.autograd.grad(loss, [*kept, *model.blocks[1].a.parameters()]))

    for one, other in zip(*gradients(model, 0.8, kept, ask, modules=whole), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    if whole is None:
        with pytest.raises(mfx.BackwardError, match=r"block 'blocks\.1'.*computed from it and noted before it"):
            gradients(model, 0.8, kept, ask_both)
    else:
        for one, other in zip(*gradients(model, 0.8, kept, ask_both, modules=whole), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def test_who_waits_for_the_moment_only_is_let_through():
    """register_multi_grad_hook is torch's, as are the hooks by which sharding learns that a backward begins."""
    model, x, seen = Attentive(), torch.randn(5, 6, dtype=torch.float64), []
    found = []
    for reversible in (True, False):
        out, weights = mfx.momentumize(model, 0.8, reversible=reversible)(x)
        torch.autograd.graph.register_multi_grad_hook(weights, lambda _: seen.append(1))
        loss = out.sum() + sum(each.square().sum() for each in weights)
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    assert relative_error(*found) < 1e-10
    assert seen


def test_with_its_block_kept_a_branch_value_has_its_whole_gradient():
    model, x, found = Attentive(), torch.randn(5, 6, dtype=torch.float64), []
    for options in ({"exclude": "blocks.1"}, {"exclude": "blocks.1", "reversible": False}):
        out, weights = mfx.momentumize(model, 0.8, **options)(x)
        found.append(torch.autograd.grad(out.square().sum(), weights[1]))
    assert found[0][0].norm() > 0
    assert relative_error(*found) < 1e-10


COMPUTED = {
    "mean": lambda out: out.square().mean(),
    "in two steps": lambda out: (out.flatten() * 2).sum(),
    "a list": lambda out: [out.sin(), out.cos()][0],
    "a view": lambda out: out[1:],
    "a view of what was computed": lambda out: (out * 2).flatten(),
    "one view of several": lambda out: out.unbind(1)[0],
}


@pytest.mark.parametrize("whole", [None, "blocks.?"])
@pytest.mark.parametrize("compute", COMPUTED)
def test_a_loss_on_what_a_hook_computed_is_right_at_gamma_0(compute: str, whole: Any):
    model, kept = Net(block=Mixed), []
    model.blocks[1].a.register_forward_hook(lambda m, args, out: kept.append(COMPUTED[compute](out)))
    ours, theirs = steps(model, 0.0, lambda out: out.square().sum() + kept.pop().sum(), modules=whole)
    assert [g is None for g in ours] == [g is None for g in theirs]
    assert relative_error(ours, theirs) == 0
    assert not kept, "the hook runs once a step"


@pytest.mark.parametrize("whole", [None, "blocks.?"])
@pytest.mark.parametrize("way", ASKS)
def test_at_gamma_0_a_forward_hook_may_ask_for_the_gradient_at_once(way: str, whole: Any):
    model, seen, found = Net(block=Mixed), [], []
    ask = {
        "retain_grad": lambda out: [out.retain_grad(), seen.append(out)].clear(),
        "register_hook": lambda out: [out.register_hook(seen.append)].clear(),
    }[way]
    for module in (model.blocks[1].norm, model.blocks[1].a):
        module.register_forward_hook(lambda m, args, out: ask(out))
    for each in (mfx.momentumize(model, 0.0, modules=whole), NetByHand(model, 0.0)):
        torch.manual_seed(1)
        each(torch.linspace(-2, 2, 20, dtype=torch.float64).reshape(5, 4)).square().sum().backward()
        found.append([value.grad if way == "retain_grad" else value for value in seen])
        seen.clear()
    assert len(found[0]) == len(found[1]) == 2
    norms = [sorted(float(gradient.norm()) for gradient in each) for each in found]
    assert norms[0] == pytest.approx(norms[1])


@pytest.mark.parametrize("whole", [None, "blocks.?"])
@pytest.mark.parametrize("compute", COMPUTED)
def test_a_loss_on_what_a_hook_computed_is_an_error_and_never_lost(compute: str, whole: Any):
    model, kept = Net(block=Mixed), []
    model.blocks[1].a.register_forward_hook(lambda m, args, out: kept.append(COMPUTED[compute](out)))
    mm = mfx.momentumize(model, 0.8, modules=whole)
    out = mm(rows(5).double()[:, :4]).sum()
    with pytest.raises(mfx.BackwardError, match=r"hook of Linear computed a value.*after the model has run"):
        (out + kept[-1].sum()).backward()


@pytest.mark.parametrize("whole", [None, "blocks.?"])
def test_what_a_hook_computes_for_itself_is_left_alone(whole: Any):
    model, kept = Net(block=Mixed), []

    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        kept.append((out.mean().item(), out.detach().abs().mean(), out.argmax()))
        with torch.no_grad():
            kept.append(out.std())
        out.pow(2).sum()

    model.blocks[1].a.register_forward_hook(hook)
    ours, theirs = steps(model, 0.8, lambda out: out.sum(), modules=whole)
    assert relative_error(ours, theirs) < 1e-10
    assert not any(leaf.requires_grad for leaf in (kept[0][1], kept[1]))


ELSEWHERE: list[Tensor] = []


class Auxiliary(Mixed):
    """Puts a loss of its own into a list of somebody else's."""

    def branch(self, x: Tensor) -> Tensor:
        y = self.a(x)
        ELSEWHERE.append(y.logsumexp(-1).square().mean())
        ELSEWHERE.append(y.detach().mean())
        return self.b(self.drop(torch.tanh(self.norm(y))))


def test_at_gamma_0_a_loss_on_what_a_module_put_elsewhere_is_right():
    def loss(out: Tensor) -> Tensor:
        values, _ = list(ELSEWHERE), ELSEWHERE.clear()
        return out.square().sum() + sum(values[::2])

    ELSEWHERE.clear()
    model = Net(block=Auxiliary)
    mm, x, found = mfx.momentumize(model, 0.0, modules="blocks.?"), rows(5).double()[:, :4], []
    mm(x)  # whose capture is proven by running the model
    for each in (mm, mm, NetByHand(model, 0.0)):
        ELSEWHERE.clear()
        torch.manual_seed(1)
        found.append(torch.autograd.grad(loss(each(x)), list(model.parameters())))
    assert relative_error(found[0], found[2]) == relative_error(found[1], found[2]) == 0


def test_a_loss_on_what_a_module_put_elsewhere_is_an_error_at_every_step():
    mm = mfx.momentumize(Net(block=Auxiliary), 0.8, modules="blocks.?")
    for _ in range(2):
        ELSEWHERE.clear()
        out = mm(rows(5).double()[:, :4]).sum()
        assert not ELSEWHERE[-1].requires_grad
        with pytest.raises(mfx.BackwardError, match=r"module of block 'blocks\.2' computed a value that was kept else"):
            (out + ELSEWHERE[-2]).backward()
