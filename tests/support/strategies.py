"""Random residual models for Hypothesis, as small trees of values.

``models()`` draws a :class:`Model`, a description.  :mod:`described` makes the network of it, :mod:`program` and
:mod:`oracle` say on their own what it computes.  The simplest one, to which counterexamples shrink, is a single block
``x + linear(x)``.  ``unusual_models()`` adds what captures are known to lose.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

DRAW_FUNCTIONS = True
DRAW_NO_GRAD = True
DRAW_AUTOCAST = True
DRAW_OBJECTS = True
DRAW_HOOKS = True
DRAW_TIED = True
DRAW_TIED_AFTERWARDS = True
"""Which unusual things are drawn: custom functions, ``no_grad`` and autocast islands, objects as arguments, forward
hooks, weights tied before the capture, and tied or untied after it.  Those switched off come out wrong today, without
a word: an error or a warning would do."""

ROWS, WIDTH = 5, 3

ISLANDS = ("rounded",) * DRAW_FUNCTIONS + ("gate",) * DRAW_NO_GRAD + ("autocast_off", "autocast_on") * DRAW_AUTOCAST
"""Layers that a capture which records operations alone would lose a part of; in branches, and between stages."""
ARGUMENTS = ("tensors", "dict", "list", *("object",) * DRAW_OBJECTS)
TIES = ("", *("before",) * DRAW_TIED, *("after", "untied after") * DRAW_TIED_AFTERWARDS)
HOOKS = ((), *(("layer",), ("block",)) * DRAW_HOOKS)
PRECISIONS = ("double", *("single", "autocast") * DRAW_AUTOCAST)

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
    arguments: str = "tensors"
    hooks: tuple[str, ...] = ()
    tied: str = ""
    precision: str = "double"

    @property
    def example(self) -> bool:
        """Whether planning gets example inputs; a broadcasting add cannot be told from a block
        without, nor how arguments are packed."""
        return self.shapes or self.arguments != "tensors" or any(s.between == "broadcast add" for s in self.stages)

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters and inputs."""
        return torch.float64 if self.precision == "double" else torch.float32


def blocks(depth: int = 1, layers: tuple[str, ...] = LAYERS + LAYERS_IN_PLACE) -> st.SearchStrategy[Block]:
    """One block, with others nested up to ``depth``."""
    inner = st.just(()) if depth == 0 else st.lists(blocks(depth - 1, layers), max_size=2).map(tuple)
    return st.builds(
        Block,
        layers=st.lists(st.sampled_from(layers), max_size=3).map(lambda rest: ("linear", *rest)),
        form=st.sampled_from(FORMS),
        tail=st.sampled_from(TAILS),
        inner=inner,
        side=st.sampled_from(("", "mask", "memory", "earlier state")),
        returned=st.sampled_from(("", "", "branch value", "shape")),
        tap=st.sampled_from(("", "", "state", "head")),
        again=st.booleans(),
    )


def stages(layers: tuple[str, ...], between: tuple[str, ...]) -> st.SearchStrategy[tuple[Stage, ...]]:
    """Up to three stages of up to four blocks."""
    stage = st.builds(
        Stage,
        blocks=st.lists(blocks(layers=layers), min_size=1, max_size=4).map(tuple),
        between=st.sampled_from(between),
        long_skip=st.booleans(),
    )
    return st.lists(stage, min_size=1, max_size=3).map(tuple)


def models() -> st.SearchStrategy[Model]:
    """Models of which all must be right; the oracle knows each of their layers."""
    return st.builds(
        Model,
        stages=stages(LAYERS + LAYERS_IN_PLACE + ISLANDS, BETWEEN),
        training=st.booleans(),
        frozen_norms=st.booleans(),
        frozen=st.lists(st.booleans(), min_size=1, max_size=5).map(tuple),
        input_grad=st.booleans(),
        shapes=st.booleans(),
    )


def unusual_models() -> st.SearchStrategy[Model]:
    """Models with what captures lose; each must be right, or refused with an error or a warning.

    Without batch norm, which would make too much of float32's noise.
    """
    return st.builds(
        Model,
        stages=stages(("linear", "relu", "dropout", *ISLANDS), ("nothing", "linear", *ISLANDS)),
        training=st.booleans(),
        frozen=st.lists(st.booleans(), min_size=1, max_size=5).map(tuple),
        input_grad=st.booleans(),
        shapes=st.booleans(),
        arguments=st.sampled_from(ARGUMENTS),
        hooks=st.sampled_from(HOOKS),
        tied=st.sampled_from(TIES),
        precision=st.sampled_from(PRECISIONS),
    )


def gammas() -> st.SearchStrategy[float | dict[str, float]]:
    """One gamma, or several by block name that leave some blocks out."""
    value = st.sampled_from((0.5, 0.9, 0.0, 0.1, 0.99))
    by_name = st.fixed_dictionaries({"*[02468]": value, "*": value}) | st.fixed_dictionaries({"*[01]": value})
    return value | by_name
