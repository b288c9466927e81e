"""Draws: which operations take random numbers, and which of them can be made to take the same ones again.

:data:`RANDOM` is the one list of random operations, by plain name.  An operation that is *repeatable* has a form in
:mod:`mfx.run.seeded.forms` that computes the same values from a seed, which a compiler needs: it traces a
recomputation as further operations and can rewind no generator.  Opaque functions and modules of other libraries may
draw.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mfx.torch_versions import DropoutNd


@dataclass(frozen=True)
class Draw:
    """``dropout``: a function of (x, p, training) whose value has x's shape, and may be x.

    ``factory``: makes a tensor from sizes alone.  ``repeatable``: a compiler can be given the draw again.
    """

    dropout: bool = False
    factory: bool = False
    repeatable: bool = False


def _rows(names: str, *, dropout: bool = False, factory: bool = False, repeatable: bool = False) -> dict[str, Draw]:
    return dict.fromkeys(names.split(), Draw(dropout, factory, repeatable))


RANDOM: dict[str, Draw] = {
    **_rows("dropout dropout1d dropout2d dropout3d alpha_dropout", dropout=True, repeatable=True),
    **_rows("feature_dropout feature_alpha_dropout", dropout=True, repeatable=True),
    **_rows("stochastic_depth", dropout=True),
    **_rows("dropout_ alpha_dropout_ feature_dropout_ feature_alpha_dropout_", repeatable=True),
    **_rows("rand randn", factory=True, repeatable=True),
    **_rows("randint randperm normal", factory=True),
    **_rows("rand_like randn_like bernoulli bernoulli_ uniform_ normal_ exponential_", repeatable=True),
    **_rows("scaled_dot_product_attention multi_head_attention_forward gumbel_softmax", repeatable=True),
    **_rows("native_dropout drop_block2d drop_block3d rrelu rrelu_ randint_like"),
    **_rows("multinomial poisson binomial random_ cauchy_ log_normal_ geometric_"),
    **_rows("fractional_max_pool2d fractional_max_pool3d"),
    **_rows("fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices"),
}
"""What draws, by plain name."""

_MODULES: dict[type[nn.Module], Draw] = {
    DropoutNd: Draw(repeatable=True),
    nn.MultiheadAttention: Draw(repeatable=True),
    nn.RReLU: Draw(),
    nn.FractionalMaxPool2d: Draw(),
    nn.FractionalMaxPool3d: Draw(),
    nn.RNNBase: Draw(),
}
"""torch's own modules that draw."""


def is_dropout(name: str) -> bool:
    """Whether the operation of this plain name is a dropout."""
    return name in RANDOM and RANDOM[name].dropout


def module_is_random(module: nn.Module) -> bool:
    """Whether a module may draw random numbers (in some mode)."""
    return any(_draw_of(inner) is not None or _is_foreign(inner) for inner in module.modules())


def module_is_repeatable(module: nn.Module) -> bool:
    """Whether a compiler can be given all draws of a module again.

    One that is not torch's own is taken for its parts: a compiler traces through it and meets only these.
    """
    draws = [_draw_of(inner) for inner in module.modules()]
    return all(draw is None or draw.repeatable for draw in draws)


def module_sees_grad_mode(module: nn.Module) -> bool:
    """Whether a module may compute otherwise where gradients are off."""
    return any(isinstance(inner, nn.MultiheadAttention) or _is_foreign(inner) for inner in module.modules())


def _draw_of(module: nn.Module) -> Draw | None:
    """What one of torch's own modules draws, as it is set."""
    chance = getattr(module, "p", 1) if isinstance(module, DropoutNd) else getattr(module, "dropout", 1)
    return None if chance == 0 else next((draw for kind, draw in _MODULES.items() if isinstance(module, kind)), None)


def _is_foreign(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.nn")
