"""What a training step takes it gives back, and depth costs parameters only: by the allocator (M3, M14)."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mfx
from mfx import memory
from mfx.memory import KeptBytes, StepBytes, allocated_bytes, kept_bytes, peak_bytes, settled, step_bytes

NOISE = 1 << 14
"""Bytes that freed blocks and nodes of autograd may differ by from step to step."""

Made = tuple[Callable[[Tensor], Tensor], Tensor]

by_the_allocator = pytest.mark.skipif(allocated_bytes() is None, reason="the C library's allocator cannot be asked")


class SelfAttention(nn.Module):
    """Normalized attention with dropout of its weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.attention(y, y, y, need_weights=False)[0]


class Layer(nn.Module):
    """Attention and an MLP with dropout, two residual adds."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attend = SelfAttention(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + F.dropout(self.down(F.silu(self.up(x))), 0.1, self.training)


class Rectified(nn.Module):
    """Batch norm, ReLU, dropout; its own class, so that it is run as in its recomputation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(width), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.flatten(0, 1)).view_as(x)
        return self.down(self.dropout(torch.relu(self.up(y)).sigmoid()))


class Added(Rectified):
    """x + what its parent gives."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def tokens() -> Tensor:
    """32 KiB."""
    return torch.randn(8, 32, 32)


def by_fx(depth: int) -> Made:
    return mfx.momentumize(nn.Sequential(*(Layer(32) for _ in range(depth))), 0.9, capture="fx"), tokens()


def by_dynamo(depth: int) -> Made:
    model, x = nn.Sequential(*(Layer(32) for _ in range(depth))), tokens()
    return mfx.momentumize(model, 0.9, capture="dynamo", example_inputs=x), x


def momentum_net(depth: int) -> Made:
    functions = [(SelfAttention, Rectified)[index % 2](32) for index in range(depth)]
    return mfx.MomentumNet(functions, gamma=0.9, use_backprop=False), tokens()


def named_modules(depth: int) -> Made:
    return mfx.momentumize(nn.Sequential(*(Added(32) for _ in range(depth))), 0.9, modules="*"), tokens()


def transformed(depth: int) -> Made:
    model = nn.Sequential()
    model.add_module("stage", nn.Sequential(*(Added(32) for _ in range(depth))))
    return mfx.transform_to_momentumnet(model, ["stage"], use_backprop=False, keep_first_layer=False), tokens()


def compiled(depth: int) -> Made:
    model = mfx.momentumize(nn.Sequential(*(Added(32) for _ in range(depth))), 0.9)
    return torch.compile(model, backend="aot_eager", fullgraph=True), tokens()


def by_inductor(depth: int) -> Made:
    model = mfx.momentumize(nn.Sequential(*(Added(32) for _ in range(depth))), 0.9)
    return torch.compile(model, backend="inductor", fullgraph=True), tokens()


def resnet18(depth: int) -> Made:
    models = pytest.importorskip("torchvision").models
    model = mfx.transform_to_momentumnet(models.resnet18(num_classes=depth), use_backprop=False)
    return model, torch.randn(4, 3, 32, 32)


DEEP: list[Any] = [by_fx, by_dynamo, momentum_net, named_modules, transformed, compiled]
DEEP.append(pytest.param(by_inductor, marks=pytest.mark.slow))


def steps(made: Made, count: int = 4) -> list[StepBytes]:
    """The bytes of some training steps, after two that make what stays."""
    run, x = made
    for _ in range(2):
        run(x).square().mean().backward()
    with settled():
        found = [step_bytes(lambda: run(x), lambda y: y.square().mean().backward()) for _ in range(count)]
    return [step for step in found if step is not None]


@by_the_allocator
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("make", [*DEEP, resnet18])
def test_each_step_holds_what_the_first_held_and_gives_it_back(make):
    found = steps(make(4))
    assert len(found) == 4
    assert max(abs(step.after_backward) for step in found) <= NOISE
    held = [step.after_forward for step in found]
    assert min(held) > 0
    assert max(held) - min(held) <= NOISE


@by_the_allocator
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("make", DEEP)
def test_what_a_forward_holds_does_not_grow_with_depth(make):
    """But for snapshots, and 5 KB of the generator's state for each block that draws."""
    shallow, deep = (min(step.after_forward for step in steps(make(depth), 2)) for depth in (3, 9))
    blocks = 2 * (9 - 3)
    assert deep - shallow <= 4 * tokens().nbytes + blocks * 8192


@by_the_allocator
@pytest.mark.parametrize("make", [by_fx, momentum_net, named_modules, transformed])
def test_nothing_waits_for_the_garbage_collector(make, monkeypatch):
    run, x = make(4)
    for _ in range(2):
        run(x).square().mean().backward()
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)
    gc.disable()
    try:
        found = [step_bytes(lambda: run(x), lambda y: y.square().mean().backward()) for _ in range(3)]
    finally:
        gc.enable()
    assert all(step is not None and abs(step.after_backward) <= NOISE for step in found)


@by_the_allocator
def test_the_allocator_sees_what_no_saved_tensor_shows():
    """A node that saves its own result, through hooks that give it back as it is: only a backward ends the cycle."""
    x = torch.ones(1 << 18, requires_grad=True)

    def forward() -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
            return x.exp().sum()

    found = [step_bytes(forward, lambda y: None) for _ in range(2)]
    assert all(step is not None and step.after_backward >= x.nbytes - NOISE for step in found)
    found = [step_bytes(lambda: x.exp().sum(), lambda y: None) for _ in range(2)]
    assert all(step is not None and step.after_backward <= NOISE for step in found)


@by_the_allocator
def test_the_allocator_counts_a_tensor_while_it_is_there():
    start = allocated_bytes("cpu")
    tensor = torch.zeros(1 << 20)
    middle = allocated_bytes("cpu")
    assert start is not None
    assert middle is not None
    assert tensor.nbytes <= middle - start <= tensor.nbytes + NOISE
    del tensor
    end = allocated_bytes("cpu")
    assert end is not None
    assert abs(end - start) <= NOISE


@by_the_allocator
def test_counting_what_is_kept_keeps_nothing():
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()), torch.randn(1024, 64)
    sizes = [step_bytes(lambda: kept_bytes(model, [x], lambda: model(x)), lambda found: None) for _ in range(4)]
    assert all(size is not None and size.after_backward <= NOISE for size in sizes[1:])


def test_what_a_jagged_tensor_keeps_are_its_values():
    x = torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], layout=torch.jagged).requires_grad_()
    with KeptBytes([x]) as kept:
        y = (x * 2).exp()
    assert kept.total() == 5 * 4 * 4  # exp keeps its result
    assert kept.total([y]) == 5 * 4 * 4


def test_where_the_allocator_cannot_be_asked_nothing_is_said(monkeypatch):
    monkeypatch.setattr(memory, "_heap", lambda: None)
    assert allocated_bytes() is None
    assert step_bytes(lambda: torch.ones(2), lambda y: None) is None
    assert allocated_bytes("meta") is None
    assert peak_bytes(lambda: None, "cpu") is None


def test_an_allocator_in_place_of_glibcs_is_not_believed(monkeypatch):
    """Figures that stay where they are while a tensor is made are not those of torch's allocator."""

    class Library:
        class mallinfo2:
            restype: type

            def __new__(cls) -> Any:
                return memory._Mallinfo2()

    memory._heap.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library)
    assert allocated_bytes() is None
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: sys)
    memory._heap.cache_clear()
    assert allocated_bytes() is None
    memory._heap.cache_clear()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_on_cuda_the_caching_allocator_is_asked():
    x = torch.ones(1 << 18, device="cuda", requires_grad=True)
    found = step_bytes(lambda: x.exp().sum(), lambda y: torch.autograd.grad(y, x), "cuda")
    assert found is not None
    assert x.nbytes <= found.after_forward <= x.nbytes + 4096
    assert found.after_backward == 0
    peak = peak_bytes(lambda: torch.autograd.grad(x.exp().sum(), x), "cuda")
    assert peak is not None
    assert peak >= 2 * x.nbytes
