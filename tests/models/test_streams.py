"""Streams that read each other, against recurrences written by hand: ``v <- g v + (1 - g) (G(s) - s), s <- s + v``."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_same, chain_names, relative_error, run
from torch import Tensor, nn

import mfx

Streams = tuple[Tensor, ...]


class Layer(nn.Module):
    """``rounds`` are functions of all streams that give all of them; ``forward`` runs one after the other."""

    rounds: tuple[str, ...] = ("all",)

    def __init__(self, d: int = 6, p: float = 0.3) -> None:
        super().__init__()
        self.joint, self.f, self.g = nn.Linear(2 * d, 2 * d), nn.Linear(d, d), nn.Linear(d, d)
        self.norm, self.drop = nn.LayerNorm(d), nn.Dropout(p)

    def forward(self, *streams: Tensor, **kwargs: Tensor) -> Streams:
        for name in self.rounds:
            streams = getattr(self, name)(*streams, **kwargs)
        return streams


class Joint(Layer):
    """One attention over text and picture, then a feed-forward part each (SD3, Flux)."""

    rounds = ("attend", "feed")

    def attend(self, x: Tensor, y: Tensor) -> Streams:
        both = torch.cat([self.norm(x), y], 1)
        both = torch.softmax(both @ both.transpose(1, 2), -1) @ self.f(both)
        p, q = self.drop(both).split([x.shape[1], y.shape[1]], 1)
        return x + p, y + self.g(q)

    def feed(self, x: Tensor, y: Tensor) -> Streams:
        return x + self.drop(torch.tanh(self.f(x))), y + torch.tanh(self.g(y))


class InPlace(Joint):
    def feed(self, x: Tensor, y: Tensor) -> Streams:
        x += self.drop(torch.tanh(self.f(x.roll(1, 1))))
        y += torch.tanh(self.g(y.roll(1, 1)))
        return x, y


class Apart(Layer):
    """Nodes and coordinates of a graph, both from the old ones (EGNN)."""

    def all(self, x: Tensor, y: Tensor) -> Streams:
        return x + self.drop(self.f(x) * y.mean(1, keepdim=True)), y + self.g(y) * x.mean(1, keepdim=True)


class InTurn(Layer):
    """Each from the newest of the other (edges after nodes)."""

    def all(self, x: Tensor, y: Tensor) -> Streams:
        x = x + self.drop(self.f(x) * y.mean(1, keepdim=True))
        return x, y + self.g(y) * x.mean(1, keepdim=True)


class Often(Layer):
    """One is updated three times before the other (a two-way decoder)."""

    def all(self, x: Tensor, y: Tensor) -> Streams:
        for _ in range(2):
            x = self.norm(x + self.drop(self.f(x)))
        x = x + torch.tanh(self.g(x)) * y.mean(1, keepdim=True)
        return x, y + self.g(y) * x.mean(1, keepdim=True)


class Dropped(Layer):
    """Drops of the states themselves, so that draws go by their order in memory."""

    def all(self, x: Tensor, y: Tensor) -> Streams:
        return x + self.f(self.drop(x)) * y.mean(1, keepdim=True), y + self.g(y) * x.mean(1, keepdim=True)


class OneByOne(Layer):
    """Both read the old states, but one is ready, with all its draws, before the other begins."""

    def all(self, x: Tensor, y: Tensor) -> Streams:
        both = torch.cat([x, y], 1).mean(1, keepdim=True)
        x, old = x + self.drop(self.f(x) * both), x
        x = x + self.drop(torch.tanh(self.f(x)))
        y = y + self.drop(self.g(y) * both * old.mean(1, keepdim=True))
        return x, y + self.drop(torch.tanh(self.g(y)))


class Normed(Layer):
    """Batch normalization in the branches of both."""

    def __init__(self, d: int = 6, p: float = 0.3) -> None:
        super().__init__(d, p)
        self.one, self.other = nn.BatchNorm1d(d), nn.BatchNorm1d(d)

    def all(self, x: Tensor, y: Tensor) -> Streams:
        p = self.one(self.f(x).transpose(1, 2)).transpose(1, 2) * y.mean(1, keepdim=True)
        q = self.other(self.g(y).transpose(1, 2)).transpose(1, 2) * x.mean(1, keepdim=True)
        return x + self.drop(p), y + self.drop(q)


class PostNorm(Layer):
    def all(self, x: Tensor, y: Tensor) -> Streams:
        p, q = self.f(x) * y.mean(1, keepdim=True), self.g(y) * x.mean(1, keepdim=True)
        return self.norm(x + self.drop(p)), self.norm(y + q)


class Three(Layer):
    def all(self, x: Tensor, y: Tensor, z: Tensor) -> Streams:
        m = self.drop(self.f(x)).mean(1, keepdim=True)
        n = self.g(y).mean(1, keepdim=True)
        k = torch.tanh(self.g(z)).mean(1, keepdim=True)
        return x + n * self.f(x) + k, y + k * torch.tanh(self.f(y)), z + self.f(z) * n * m


class Conditioned(Layer):
    """Both read a side input."""

    def all(self, x: Tensor, y: Tensor, c: Tensor) -> Streams:
        p, q = self.f(x) * y.mean(1, keepdim=True) * c, self.g(y) * x.mean(1, keepdim=True)
        return x + self.drop(p), y + q + c


class Net(nn.Module):
    def __init__(self, layer: type[Layer] = Joint, n: int = 4, **kwargs: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList(layer(**kwargs) for _ in range(n))
        self.double()

    def forward(self, *streams: Tensor, **kwargs: Tensor) -> Streams:
        streams = (self.embed(streams[0]), *streams[1:])
        for layer in self.layers:
            streams = layer(*streams, **kwargs)
        return self.head(streams[0]), *streams[1:]


class ByHand(nn.Module):
    """What a momentumized :class:`Net` has to compute."""

    def __init__(self, net: Net, gamma: float) -> None:
        super().__init__()
        self.net, self.gamma = net, gamma

    def forward(self, *streams: Tensor, **kwargs: Tensor) -> Streams:
        streams = (self.net.embed(streams[0]), *streams[1:])
        velocities = [torch.zeros_like(stream) for stream in streams]
        for layer in self.net.layers:
            for name in layer.rounds:
                given = [stream.clone() for stream in streams]
                after = getattr(layer, name)(*given, **kwargs)
                moves = [g - s for g, s in zip(after, streams, strict=True)]
                velocities = [
                    self.gamma * v + (1 - self.gamma) * move for v, move in zip(velocities, moves, strict=True)
                ]
                streams = tuple(s + v for s, v in zip(streams, velocities, strict=True))
        return self.net.head(streams[0]), *streams[1:]


def tokens(*counts: int, batch: int = 3) -> Streams:
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(batch, count, 6, generator=generator, dtype=torch.float64).requires_grad_() for count in counts
    )


def same(mm: nn.Module, net: Net, gamma: float, *streams: Tensor, **kwargs: Tensor) -> None:
    ours, by_hand = run(mm, *streams, **kwargs), run(ByHand(net, gamma), *streams, **kwargs)
    for named in (ours.grads, by_hand.grads, ours.buffers, by_hand.buffers):
        plain = {name.removeprefix("net.").removeprefix("_orig_mod."): value for name, value in named.items()}
        named.clear()
        named.update(plain)
    assert_same(ours, by_hand, 1e-9)


LAYERS = [Joint, InPlace, Apart, InTurn, Often, PostNorm, Dropped, Normed]


@pytest.mark.parametrize("gamma", [0.0, 0.8])
@pytest.mark.parametrize("capture", ["fx", "dynamo"])
@pytest.mark.parametrize("layer", LAYERS)
def test_two_streams_are_one_chain_and_the_recurrence_written_by_hand(layer, capture, gamma):
    net = Net(layer)
    mm = mfx.momentumize(net, gamma, example_inputs=tokens(4, 5), capture=capture)
    (chain,) = chain_names(mm)
    assert len(chain) == 4 * len(layer.rounds)
    same(mm, net, gamma, *tokens(4, 5))
    mm.eval()
    same(mm, net, gamma, *tokens(4, 5, batch=2))


def test_three_streams():
    net = Net(Three)
    mm = mfx.momentumize(net, 0.7, example_inputs=tokens(4, 5, 2))
    assert [len(chain) for chain in chain_names(mm)] == [4]
    same(mm, net, 0.7, *tokens(4, 5, 2))


def test_streams_with_a_side_input_that_needs_a_gradient():
    class Sided(Net):
        def forward(self, x: Tensor, y: Tensor, c: Tensor) -> Streams:
            return super().forward(x, y, c=c)

    net = Sided(Conditioned)
    c = torch.rand(3, 1, 6, dtype=torch.float64, requires_grad=True)
    mm = mfx.momentumize(net, 0.7, example_inputs=(*tokens(4, 5), c))
    assert [len(chain) for chain in chain_names(mm)] == [4]
    same(mm, net, 0.7, *tokens(4, 5), c=c)


@pytest.mark.parametrize("backend", ["aot_eager"])
@pytest.mark.parametrize("layer", [Joint, InTurn])
def test_compiled_streams(layer, backend, fresh_dynamo):
    net = Net(layer)
    mm = mfx.momentumize(net, 0.8, example_inputs=tokens(4, 5))
    same(torch.compile(mm, backend=backend, fullgraph=True), net, 0.8, *tokens(4, 5))
    inside = torch.compile(net, backend=mfx.backend(0.8, backend), fullgraph=True)
    same(inside, net, 0.8, *tokens(4, 5))


def test_a_stream_keeps_the_order_of_its_dimensions_in_memory():
    """Dropout draws in the order of memory."""
    net = Net(Dropped, p=0.5)
    x, y = tokens(4, 5)
    x = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    net.embed = nn.Identity()
    mm = mfx.momentumize(net, 0.0, example_inputs=(x, y))
    assert [len(chain) for chain in chain_names(mm)] == [4]
    assert_same(run(mm, x, y), run(net, x, y), 1e-12)


def test_nothing_is_joined_where_draws_would_come_in_another_order():
    net = Net(OneByOne, p=0.5)
    mm = mfx.momentumize(net, 0.0, example_inputs=tokens(4, 5))
    assert_same(run(mm, *tokens(4, 5)), run(net, *tokens(4, 5)), 1e-12)


class Tapped(Net):
    """Hands out every state of one stream, and ends with a layer for the other alone."""

    def forward(self, x: Tensor, y: Tensor) -> Streams:
        states = []
        for layer in self.layers:
            x, y = layer(x, y)
            states.append(y)
        last = x + torch.tanh(self.embed(torch.cat([x, y], 1))[:, : x.shape[1]])
        return self.head(last), *states


def test_states_are_handed_out_and_the_last_layer_may_be_for_one_stream():
    net = Tapped(Apart, p=0.0)
    mm = mfx.momentumize(net, 0.6, example_inputs=tokens(4, 5))
    (x, y), gamma, v, w, states = tokens(4, 5), 0.6, 0.0, 0.0, []
    (a, b) = tokens(4, 5)
    for layer in net.layers:
        p, q = layer(x, y)
        v, w = gamma * v + (1 - gamma) * (p - x), gamma * w + (1 - gamma) * (q - y)
        x, y = x + v, y + w
        states.append(y)
    assert sorted(map(len, chain_names(mm))) in ([1, 4], [4])
    last = x + (1 - gamma if len(chain_names(mm)) == 2 else 1) * torch.tanh(net.embed(torch.cat([x, y], 1))[:, :4])
    out = mm(a, b)
    assert relative_error(out, (net.head(last), *states)) < 1e-10


@pytest.mark.parametrize("gamma", [0.0, 0.9])
def test_other_dtypes_are_not_joined(gamma):
    class Mixed(Net):
        def forward(self, x: Tensor, y: Tensor) -> Streams:
            y = y.float()
            for layer in self.layers:
                m = y.double().mean(1, keepdim=True)
                y = y + layer.g(y.double()).float() * x.float().mean(1, keepdim=True)
                x = x + layer.f(x) * m
            return x, y

    net = Mixed(Apart)
    mm = mfx.momentumize(net, gamma, example_inputs=tokens(4, 5))
    stored = mfx.momentumize(copy.deepcopy(net), gamma, example_inputs=tokens(4, 5), reversible=False)
    assert relative_error(run(mm, *tokens(4, 5)).outputs, run(stored, *tokens(4, 5)).outputs) < 1e-6
    assert all(len(row.streams) == 0 for row in mfx.report(net, tokens(4, 5)).blocks)


def test_a_report_names_the_shapes_of_all_streams():
    report = mfx.report(Net(Joint), tokens(4, 5))
    assert [row.name for row in report.blocks] == [f"layers.{n}#{k}" for n in range(4) for k in range(2)]
    assert {row.streams for row in report.blocks} == {((3, 4, 6), (3, 5, 6))}
    assert "3x4x6, 3x5x6" in str(report)
    assert all(row.activation_bytes for row in report.blocks)


def test_bytes_do_not_grow_with_depth():
    held = []
    for depth in (4, 12):
        found = mfx.verify(Net(Joint, depth), tokens(4, 5), gamma=0.9)
        assert found.ok
        held.append(found.saved_bytes)
    assert held[1] <= 1.05 * held[0]
