"""Described: the modules, inputs and modes that a description of :mod:`strategies` stands for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from layers import FunctionalBatchNorm, layer
from strategies import ISLANDS, ROWS, WIDTH, Block, Model, Stage
from torch import Tensor, nn


@dataclass
class Sides:
    """What comes with x, as an object that is no container to torch."""

    mask: Tensor
    memory: Tensor


def inputs(model: Model, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The input, a mask and a memory."""
    generator = torch.Generator().manual_seed(seed)
    x, memory, level = (torch.randn(ROWS, width, generator=generator).to(model.dtype) for width in (WIDTH, 1, 1))
    mask = level < 0
    return x.requires_grad_(model.input_grad), mask, memory.requires_grad_(model.input_grad)


def packed(model: Model, x: Tensor, mask: Tensor, memory: Tensor, reused: Sides | None = None) -> tuple[Any, ...]:
    """The arguments as the network's forward takes them; an object may be used again, with other values."""
    if model.arguments == "object":
        sides = reused or Sides(mask, memory)
        sides.mask, sides.memory = mask, memory
        return x, sides
    if model.arguments == "dict":
        return x, {"mask": mask, "memory": memory}
    return (x, [mask, memory]) if model.arguments == "list" else (x, mask, memory)


class Called(nn.Module):
    """A network with its arguments packed, and under autocast, as the description says."""

    def __init__(self, network: nn.Module, model: Model) -> None:
        super().__init__()
        self.network = network
        self.model = model
        self.sides = Sides(torch.empty(0), torch.empty(0))

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16, self.model.precision == "autocast"):
            return self.network(*packed(self.model, x, mask, memory, self.sides))


def build(model: Model) -> nn.Module:
    """The network with fixed weights."""
    torch.manual_seed(0)
    network = (Network if model.arguments == "tensors" else Packed)(model).to(model.dtype)
    if model.tied in ("before", "untied after"):
        tie(network)
    for path in model.hooks:
        add_hook(network, path)
    for index, parameter in enumerate(network.parameters()):
        parameter.requires_grad_(not model.frozen[index % len(model.frozen)])
    return set_mode(network, model, model.training)


def set_mode(network: nn.Module, model: Model, training: bool) -> nn.Module:
    """Training or evaluation, with frozen normalization where the model has it."""
    network.train(training)
    for module in network.modules():
        if model.frozen_norms and isinstance(module, (nn.BatchNorm1d, FunctionalBatchNorm)):
            module.eval()
    return network


def tie(network: nn.Module) -> None:
    """Let two layers share a weight: of one block if any has two of a size, else the first and last of the network."""
    one, other = _alike(network)
    other.weight = one.weight


def untie(network: nn.Module) -> None:
    """Give the second of the two a weight of its own."""
    other = _alike(network)[1]
    other.weight = nn.Parameter(other.weight.detach() * 0.5)


def _alike(network: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    blocks = [module for module in network.modules() if isinstance(module, Residual)]
    layers = [[layer for layer in block.modules() if isinstance(layer, nn.Linear)] for block in [network, *blocks]]
    pairs = [(own[0], layer) for own in layers[::-1] for layer in own[1:] if layer.weight.shape == own[0].weight.shape]
    return pairs[0] if pairs else (layers[0][0], layers[0][0])


def add_hook(network: nn.Module, path: str) -> None:
    """Let a forward hook of the first block, or of its first layer, change what it gives."""
    block = next(each for each in network.modules() if isinstance(each, Residual))
    if path == "layer":
        block.layers[0].register_forward_hook(lambda module, args, value: value * 1.5)
    else:
        block.register_forward_hook(lambda module, args, given: (given[0] * 1.5, given[1]))


class Network(nn.Module):
    """Stem, stages, head; returns the head's output and all that was handed out on the way."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        width = WIDTH
        self.stem = nn.Linear(width, width)
        self.stages = nn.ModuleList()
        for stage in model.stages:
            self.stages.append(Stack(stage, width))
            width += stage.between == "wider"
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor) -> Any:
        x, handed_out = self.stem(x), []
        for stage in self.stages:
            x, more = stage(x, mask, memory)
            handed_out += more
        return self.head(x), handed_out


class Packed(Network):
    """The same, with mask and memory in one argument."""

    def forward(self, x: Tensor, sides: Any) -> Any:  # type: ignore[override]
        if isinstance(sides, Sides):
            return super().forward(x, sides.mask, sides.memory)
        return super().forward(x, *(sides.values() if isinstance(sides, dict) else sides))


class Stack(nn.Module):
    """The blocks of a stage."""

    def __init__(self, stage: Stage, width: int) -> None:
        super().__init__()
        self.stage = stage
        after = width + (stage.between == "wider")
        self.change = nn.Linear(width, after)
        self.shortcut = nn.Linear(width, after)
        self.island = layer(stage.between, width) if stage.between in ISLANDS else None
        self.blocks = nn.ModuleList()
        for spec in stage.blocks:
            again = spec.again and len(self.blocks) > 0
            self.blocks.append(self.blocks[-1] if again else Residual(spec, after))

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor) -> Any:
        if self.stage.between in ("wider", "linear"):
            x = self.change(x)
        elif self.island is not None:
            x = self.island(x)
        elif self.stage.between == "projection block":
            x = torch.relu(self.shortcut(x) + self.change(torch.tanh(x)))
        elif self.stage.between == "broadcast add":
            x = x + self.change(x).mean(1, keepdim=True)
        start, handed_out = x, []
        for block in self.blocks:
            x, more = block(x, mask, memory, start)
            handed_out += more
        return (start + x if self.stage.long_skip else x), handed_out


class Residual(nn.Module):
    """One block, as its :class:`Block` says."""

    def __init__(self, spec: Block, width: int) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleList([layer(name, width) for name in spec.layers])
        self.inner = nn.ModuleList([Residual(inner, width) for inner in spec.inner])
        self.tail = nn.Sequential(*(layer(name, width) for name in spec.tail))
        self.identity = nn.Identity()
        self.head = nn.Linear(width, 2) if spec.tap == "head" else None

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor, start: Tensor) -> Any:
        value, handed_out = self.branch(x, mask, memory, start)
        if self.spec.returned == "branch value":
            handed_out.append(value)
        elif self.spec.returned == "shape":
            handed_out.append(value.sum() / value.shape[0])
        x = self.tail(self.add(x, value))
        if self.head is not None:
            handed_out.append(self.head(x))
        elif self.spec.tap:
            handed_out.append(x)
        return x, handed_out

    def branch(self, x: Tensor, mask: Tensor, memory: Tensor, start: Tensor) -> Any:
        # An in-place add into x must not overwrite what the backward of the branch's first layer needs.
        value, handed_out = x * 0.5 if self.spec.form == "x += f" else x, []
        for each in self.layers:
            value = each(value)
        for inner in self.inner:
            value, more = inner(value, mask, memory, start)
            handed_out += more
        if self.spec.side == "mask":
            value = value.masked_fill(mask, 0.1)
        elif self.spec.side:
            value = value * (memory if self.spec.side == "memory" else start)
        return value, handed_out

    def add(self, x: Tensor, value: Tensor) -> Tensor:
        form = self.spec.form
        if form == "f += x":
            value += x
            return value
        if form == "x += f":
            x += value
            return x
        if form == "look through":
            return self.identity(x).contiguous() + value
        return {
            "x + f": lambda: x + value,
            "f + x": lambda: value + x,
            "x - f": lambda: x - value,
            "alpha": lambda: torch.add(x, value, alpha=0.5),
        }[form]()
