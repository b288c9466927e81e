"""Draws: which operations take random numbers.

:data:`RANDOM` is the one list of random operations, by plain name.  Opaque functions and modules of other libraries may
draw.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mfx.torch_versions import DropoutNd


@dataclass(frozen=True)
class Draw:
    """``dropout``: a function of (x, p, training) whose value has x's shape, and may be x.

    ``factory``: makes a tensor from sizes alone.
    """

    dropout: bool = False
    factory: bool = False


def _rows(names: str, *, dropout: bool = False, factory: bool = False) -> dict[str, Draw]:
    return dict.fromkeys(names.split(), Draw(dropout, factory))


RANDOM: dict[str, Draw] = {
    **_rows("dropout dropout1d dropout2d dropout3d alpha_dropout", dropout=True),
    **_rows("feature_dropout feature_alpha_dropout", dropout=True),
    **_rows("stochastic_depth", dropout=True),
    **_rows("dropout_ alpha_dropout_ feature_dropout_ feature_alpha_dropout_"),
    **_rows("rand randn", factory=True),
    **_rows("randint randperm normal", factory=True),
    **_rows("rand_like randn_like bernoulli bernoulli_ uniform_ normal_ exponential_"),
    **_rows("scaled_dot_product_attention multi_head_attention_forward gumbel_softmax"),
    **_rows("native_dropout drop_block2d drop_block3d rrelu rrelu_ randint_like"),
    **_rows("lstm gru rnn_tanh rnn_relu"),
    **_rows("multinomial poisson binomial random_ cauchy_ log_normal_ geometric_"),
    **_rows("fractional_max_pool2d fractional_max_pool3d"),
    **_rows("fractional_max_pool2d_with_indices fractional_max_pool3d_with_indices"),
}
"""What draws, by plain name."""

_MODULES = (DropoutNd, nn.MultiheadAttention, nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d, nn.RNNBase)
"""torch's own modules that draw."""


def is_dropout(name: str) -> bool:
    """Whether the operation of this plain name is a dropout."""
    return name in RANDOM and RANDOM[name].dropout


def module_is_random(module: nn.Module) -> bool:
    """Whether a module may draw random numbers (in some mode)."""
    return any(_draws(inner) or _is_foreign(inner) for inner in module.modules())


def module_sees_grad_mode(module: nn.Module) -> bool:
    """Whether a module may compute otherwise where gradients are off."""
    return any(isinstance(inner, nn.MultiheadAttention) or _is_foreign(inner) for inner in module.modules())


def _draws(module: nn.Module) -> bool:
    """Whether one of torch's own modules draws, as it is set."""
    chance = getattr(module, "p", 1) if isinstance(module, DropoutNd) else getattr(module, "dropout", 1)
    return chance != 0 and isinstance(module, _MODULES)


def _is_foreign(module: nn.Module) -> bool:
    return not type(module).__module__.startswith("torch.nn")
