"""Rules: the rule as callers name it, checked."""

from __future__ import annotations

import difflib
import math
from typing import Any

from mfx.errors import InputTypeError, OptionError
from mfx.rule import Leapfrog, Midpoint, Rule

RuleName = str | Rule

_NAMES = ("momentum", "midpoint", "leapfrog")
_GAMMA = 0.9


def check_rule(rule: Any, h: float | None, gamma: Any, readout: str) -> Rule | None:
    """``rule`` as a :class:`mfx.rule.base.Rule`; None for "momentum", whose gamma each block has.

    >>> check_rule("leapfrog", 0.5, 0.9, "x"), check_rule("momentum", None, 0.5, "x")
    (Leapfrog(h=0.5), None)
    """
    if h is not None and rule != "leapfrog":
        raise OptionError(f"h={h!r} is the step of rule='leapfrog', and rule is {rule!r}: leave h out")
    if rule == "momentum":
        return None
    found = _named(rule, h) if isinstance(rule, str) else _own(rule)
    if not isinstance(gamma, (int, float)) or gamma not in (_GAMMA, found.decay):
        raise OptionError(
            f"gamma={gamma!r} does not go with rule={rule!r}, whose numbers are its own (decay {found.decay:g}, pull "
            f"{found.pull:g}): leave gamma out, or take rule='momentum'"
        )
    if readout == "z" and found.coast is None:
        raise OptionError(
            f"readout='z' is where x would come to rest, and by rule={rule!r} it never does (decay {found.decay:g}): "
            "take readout='x'"
        )
    return found


def _named(rule: str, h: float | None) -> Rule:
    if rule == "midpoint":
        return Midpoint()
    if rule == "leapfrog":
        return Leapfrog() if h is None else Leapfrog(h)
    near = difflib.get_close_matches(rule, _NAMES, n=1, cutoff=0.5)
    meant = f" (did you mean {near[0]!r}?)" if near else ""
    raise OptionError(
        f"rule={rule!r}{meant}: must be one of {', '.join(map(repr, _NAMES))}, or an object of a subclass of mfx.Rule"
    )


def _own(rule: Any) -> Rule:
    """A rule of the caller's own."""
    if isinstance(rule, type) and issubclass(rule, Rule):
        raise InputTypeError(f"rule={rule.__name__} is a class: give an object of it, such as {rule.__name__}()")
    if not isinstance(rule, Rule):
        names = ", ".join(map(repr, _NAMES))
        raise InputTypeError(
            f"rule must be one of {names}, or an object of a subclass of mfx.Rule, not {type(rule).__name__} ({rule!r})"
        )
    for name in ("decay", "pull"):
        value = getattr(rule, name)
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            raise OptionError(f"{name} of rule={rule!r} is {value!r}: it must be a finite number")
    if rule.pull == 0:
        raise OptionError(f"pull of rule={rule!r} is 0, so no block would count: give another number")
    try:
        hash(rule)
    except TypeError as error:
        raise InputTypeError(
            f"rule={rule!r} has no hash, and plans are looked up by it: make its class a frozen dataclass"
        ) from error
    return rule


def refuse_gamma(options: Any) -> None:
    """Refuse a change of gamma where a rule has none."""
    if callable(options.gamma):
        raise OptionError(
            "gamma is given by modules of the model (momentum_gamma.<chain>): change what they give, or momentumize "
            "the original with another gamma"
        )
    if options.rule is not None:
        raise OptionError(
            f"the model runs by rule={options.rule!r}, which has no gamma that could be set: momentumize the original "
            "with rule='momentum' to change gamma"
        )
