"""Chains as maps of their own: forward is the model's, inverse undoes it within the bound, gradients flow."""

from __future__ import annotations

import pytest
import torch
from graphs import net
from helpers import relative_error
from nets import ConvNet, Net
from torch import Tensor, nn

import mfx


def chain_of(model: nn.Module, gamma: float = 0.9, **options: object) -> mfx.Chain:
    (chain,) = mfx.chains(mfx.momentumize(model, gamma=gamma, **options))
    return chain


@pytest.mark.parametrize("gamma", [0.99, 0.9, 0.5])
@pytest.mark.parametrize("depth", [1, 6, 30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_inverse_undoes_forward_within_the_bound(dtype, depth, gamma):
    chain = chain_of(Net(depth, p=0.0).to(dtype), gamma)
    x, v = torch.randn(5, 6, dtype=dtype), torch.randn(5, 6, dtype=dtype)
    state = chain.forward(x, v)
    assert state[0].dtype == torch.float64
    before = chain.inverse(*state)
    error = relative_error(list(before), [x, v])
    assert error <= chain.bound(dtype)


def test_forward_is_what_the_model_computes():
    model = Net(6, p=0.0)
    mm = mfx.momentumize(model, gamma=0.7)
    x = torch.randn(5, 4, dtype=torch.float64)
    x_n, v_n = mfx.chains(mm)[0](model.stem(x))
    assert relative_error([model.head(x_n)], [mm(x)]) <= 1e-10
    assert v_n.shape == x_n.shape


def test_gradients_of_the_inverse_are_those_of_the_inverse_function():
    """d(inverse(forward(x)))/dx is the identity, and gradcheck holds."""
    chain = chain_of(Net(3, p=0.0), 0.6)
    x, v = (torch.randn(2, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    again, before = chain.inverse(*chain.forward(x, v))
    weights = torch.randn_like(x)
    found = torch.autograd.grad((again * weights).sum(), [x, v], retain_graph=True)
    torch.testing.assert_close(found[0], weights)
    assert found[1].abs().max() < 1e-10
    torch.testing.assert_close(torch.autograd.grad((before * weights).sum(), v)[0], weights)
    assert torch.autograd.gradcheck(chain.inverse, (x, v))
    total = sum(value.sum() for value in chain.inverse(x, v))
    parameters = torch.autograd.grad(total, list(chain._root.parameters()))
    assert all(grad.isfinite().all() for grad in parameters)


def test_without_gradients_nothing_is_stored():
    chain = chain_of(Net(3, p=0.0))
    with torch.no_grad():
        x, v = chain.inverse(*chain.forward(torch.randn(2, 6, dtype=torch.float64)))
    assert not x.requires_grad
    assert not v.requires_grad


def test_batch_norm_in_train_mode_moves_no_statistics():  # M5
    model = ConvNet(4, p=0.0).train()
    chain = chain_of(model)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.randn(4, 6, 5, 5, dtype=torch.float64)
    again, _ = chain.inverse(*chain.forward(x))
    assert relative_error([again], [x]) <= 1e-10
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_random_draws_are_refused_and_eval_mode_is_not():
    model = Net(3, p=0.5).train()
    mm = mfx.momentumize(model, gamma=0.9)
    state = torch.get_rng_state()
    with pytest.raises(mfx.BackwardError, match=r"draws random numbers.*eval"):
        mfx.chains(mm)[0].forward(torch.randn(2, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), state)
    mm.eval()
    mm(torch.randn(2, 4, dtype=torch.float64))
    chain = mfx.chains(mm)[0]
    x = torch.randn(2, 6, dtype=torch.float64)
    assert relative_error([chain.inverse(*chain.forward(x))[0]], [x]) <= 1e-10


def test_gamma_zero_has_no_inverse():
    chain = chain_of(Net(3, p=0.0), {"blocks.1": 0.0, "*": 0.9})
    with pytest.raises(mfx.OptionError, match=r"gamma 0 at \['blocks.1'\]"):
        chain.inverse(*chain.forward(torch.randn(2, 6, dtype=torch.float64)))


def test_values_from_outside_are_given_for_each_block():
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.f(x) * mask
        x = x + self.g(x)
        return x + self.h(x * mask)

    chain = chain_of(net(forward))
    assert chain.side_counts == (1, 0, 1)
    x, mask = torch.randn(3, 4, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    sides = [[mask], [], [mask]]
    again, v = chain.inverse(*chain.forward(x, sides=sides), sides=sides)
    assert relative_error([again], [x]) <= 1e-10
    assert v.norm() <= 1e-10
    with pytest.raises(mfx.OptionError, match=r"\[1, 0, 1\] values from outside"):
        chain.forward(x)


def test_a_later_block_that_reads_an_earlier_state_cannot_be_inverted():
    def forward(self, x: Tensor) -> Tensor:
        first = x + self.f(x)
        second = first + self.g(first)
        return second + self.h(second) * first

    chain = chain_of(net(forward))
    with pytest.raises(mfx.BackwardError, match="earlier state"):
        chain.forward(torch.randn(3, 4, dtype=torch.float64))


def test_complex_values_are_refused():
    chain = chain_of(Net(2, p=0.0))
    x = torch.randn(2, 6, dtype=torch.complex128)
    with pytest.raises(mfx.InputTypeError, match="complex"):
        chain.forward(x)


def test_the_public_facts_of_a_chain():
    mm = mfx.momentumize(Net(3, p=0.0), gamma={"blocks.0": 0.5, "*": 0.9})
    (chain,) = mfx.chains(mm)
    assert chain.blocks == ("blocks.0", "blocks.1", "blocks.2")
    assert chain.gammas == (0.5, 0.9, 0.9)
    assert repr(chain) == "<chain momentum_0: 3 blocks, blocks.0 to blocks.2>"
    with pytest.raises(mfx.InputTypeError, match="momentumize"):
        mfx.chains(nn.Linear(1, 1))
