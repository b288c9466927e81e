"""Random residual models for Hypothesis: a small tree of values, and the module that it describes.

``models()`` draws a :class:`Model`; ``build`` makes the network.  The simplest one, to which counterexamples shrink,
is a single block ``x + linear(x)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

ROWS, WIDTH = 5, 3

LAYERS = ("linear", "relu", "tanh", "norm", "batch_norm", "functional_batch_norm", "dropout", "functional_dropout")
LAYERS_IN_PLACE = ("relu_in_place", "dropout_in_place", "tanh_in_place")
FORMS = ("x + f", "f + x", "f += x", "x += f", "x - f", "alpha", "look through")
TAILS = ((), ("relu",), ("norm",), ("relu_in_place",), ("dropout", "norm"))
BETWEEN = ("nothing", "wider", "linear", "projection block", "broadcast add")


@dataclass(frozen=True)
class Block:
    """One residual block; ``again`` runs the module of the block before instead of one of its own."""

    layers: tuple[str, ...] = ("linear",)
    form: str = "x + f"
    tail: tuple[str, ...] = ()
    inner: tuple[Block, ...] = ()
    side: str = ""
    returned: str = ""
    tap: str = ""
    again: bool = False


@dataclass(frozen=True)
class Stage:
    """Blocks in a row, perhaps with a skip around all of them, after a change of shape."""

    blocks: tuple[Block, ...]
    between: str = "nothing"
    long_skip: bool = False


@dataclass(frozen=True)
class Model:
    """A model and the setting it runs in."""

    stages: tuple[Stage, ...]
    training: bool = True
    frozen_norms: bool = False
    frozen: tuple[bool, ...] = (False,)
    input_grad: bool = True
    shapes: bool = True

    @property
    def example(self) -> bool:
        """Whether planning gets example inputs; a broadcasting add cannot be told from a block without."""
        return self.shapes or any(stage.between == "broadcast add" for stage in self.stages)


def blocks(depth: int = 1) -> st.SearchStrategy[Block]:
    """One block, with others nested up to ``depth``."""
    inner = st.just(()) if depth == 0 else st.lists(blocks(depth - 1), max_size=2).map(tuple)
    layers = st.lists(st.sampled_from(LAYERS + LAYERS_IN_PLACE), max_size=3).map(lambda rest: ("linear", *rest))
    return st.builds(
        Block,
        layers=layers,
        form=st.sampled_from(FORMS),
        tail=st.sampled_from(TAILS),
        inner=inner,
        side=st.sampled_from(("", "mask", "memory", "earlier state")),
        returned=st.sampled_from(("", "", "branch value", "shape")),
        tap=st.sampled_from(("", "", "state", "head")),
        again=st.booleans(),
    )


def models() -> st.SearchStrategy[Model]:
    """Up to three stages of up to four blocks."""
    stage = st.builds(
        Stage,
        blocks=st.lists(blocks(), min_size=1, max_size=4).map(tuple),
        between=st.sampled_from(BETWEEN),
        long_skip=st.booleans(),
    )
    return st.builds(
        Model,
        stages=st.lists(stage, min_size=1, max_size=3).map(tuple),
        training=st.booleans(),
        frozen_norms=st.booleans(),
        frozen=st.lists(st.booleans(), min_size=1, max_size=5).map(tuple),
        input_grad=st.booleans(),
        shapes=st.booleans(),
    )


def gammas() -> st.SearchStrategy[float | dict[str, float]]:
    """One gamma, or several by block name that leave some blocks out."""
    value = st.sampled_from((0.5, 0.9, 0.0, 0.1, 0.99))
    by_name = st.fixed_dictionaries({"*[02468]": value, "*": value}) | st.fixed_dictionaries({"*[01]": value})
    return value | by_name


def inputs(model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """The input, a mask and a memory."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    mask = torch.rand(ROWS, 1, generator=generator, dtype=torch.float64) < 0.5
    memory = torch.randn(ROWS, 1, generator=generator, dtype=torch.float64)
    return x.requires_grad_(model.input_grad), mask, memory.requires_grad_(model.input_grad)


def build(model: Model) -> nn.Module:
    """The network, in float64, with fixed weights."""
    torch.manual_seed(0)
    network = Network(model).double()
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


class Stack(nn.Module):
    """The blocks of a stage."""

    def __init__(self, stage: Stage, width: int) -> None:
        super().__init__()
        self.stage = stage
        after = width + (stage.between == "wider")
        self.change = nn.Linear(width, after)
        self.shortcut = nn.Linear(width, after)
        self.blocks = nn.ModuleList()
        for spec in stage.blocks:
            again = spec.again and len(self.blocks) > 0
            self.blocks.append(self.blocks[-1] if again else Residual(spec, after))

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor) -> Any:
        if self.stage.between in ("wider", "linear"):
            x = self.change(x)
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


class FunctionalBatchNorm(nn.Module):
    """Batch norm by the function, told by ``self.training``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.mean, self.var, self.weight, training=self.training)


class FunctionalDropout(nn.Module):
    """Dropout by the function, told by ``self.training``."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.3, self.training)


class TanhInPlace(nn.Module):
    """An activation that writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh_()


def layer(name: str, width: int) -> nn.Module:
    """One layer by its name."""
    return {
        "linear": lambda: nn.Linear(width, width),
        "relu": nn.ReLU,
        "relu_in_place": lambda: nn.ReLU(inplace=True),
        "tanh": nn.Tanh,
        "tanh_in_place": TanhInPlace,
        "norm": lambda: nn.LayerNorm(width),
        "batch_norm": lambda: nn.BatchNorm1d(width),
        "functional_batch_norm": lambda: FunctionalBatchNorm(width),
        "dropout": lambda: nn.Dropout(0.3),
        "dropout_in_place": lambda: nn.Dropout(0.3, inplace=True),
        "functional_dropout": FunctionalDropout,
    }[name]()
