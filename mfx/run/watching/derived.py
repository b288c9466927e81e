"""Derived: values of a branch that somebody keeps where they cannot be made part of the graph (M15).

A branch runs first without a history that leads anywhere.  What hooks are given, and what modules keep, becomes part of
the graph later (:mod:`mfx.run.watched`); what a hook computes, or what a module puts into a list of somebody else's,
would stay as it is, and a loss on it would be lost in silence.  So

1. operations on the values of a hook, or of a module's forward, and on what comes of them, are followed, with gradients
   on as in the model itself (what is detached, or computed under ``no_grad``, is its own affair);
2. results that somebody still holds afterwards become values whose backward raises.

Source: torch.utils.swap_tensors, by which a view that others hold becomes another tensor.
Known limits: views that somebody has weak references to raise at once; modules are followed until a run of their step
leaves nothing; tensor subclasses are left alone.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from mfx.errors import BackwardError
from mfx.torch_versions import pytree


class _Around(threading.local):
    """Those that follow what runs now, in this thread."""

    def __init__(self) -> None:
        self.modes: list[Followed] = []


_around = _Around()


@contextlib.contextmanager
def saving() -> Iterator[None]:
    """Let autograd save what it needs, whoever else wants to know of it; double backward through it is none.

    It saves without history.  Saved as it is, what a node saves of its own result would be a cycle that nothing frees.
    """
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.detach(), lambda saved: saved):
        yield


def ran(hook: Callable[..., Any], module: nn.Module, given: Sequence[Any], apart: bool) -> Any:
    """What a forward hook of ``module`` returns.

    What it computes of ``given`` and keeps raises in backward, where that is ``apart`` from the graph; else it is part
    of the graph, and saves on its own account: the second run may not have it.
    """
    if not apart:
        with saving():
            return hook(module, *given)
    with torch.enable_grad(), Followed(given) as followed:
        result = hook(module, *given)
    followed.lose(f"a forward hook of {type(module).__name__}", pytree.tree_leaves(result))
    return result


class Followed(TorchFunctionMode):
    """Notes what is computed, with gradients on, from the tensors among ``given``."""

    def __init__(self, given: Any) -> None:
        super().__init__()
        self.known = WeakIdKeyDictionary(dict.fromkeys(filter(_has_gradient, pytree.tree_leaves(given)), False))

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sources = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if torch.is_grad_enabled() and func not in _CUTS and any(source in self.known for source in sources):
            for leaf in filter(_has_gradient, pytree.tree_leaves(result)):
                self.known.setdefault(leaf, True)
        return result

    def __enter__(self) -> Followed:
        _around.modes.append(self)
        return super().__enter__()  # type: ignore[return-value]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _around.modes.remove(self)

    def lose(self, who: str, but: Iterable[Any] = ()) -> bool:
        """Let a backward through what was computed and is still there raise; ``but`` are taken care of.

        Says whether there was any.
        """
        safe = {id(value) for value in but}
        left = [value for value, made in self.known.items() if made and id(value) not in safe and type(value) is Tensor]
        self.known = WeakIdKeyDictionary()
        for value in left:
            for outer in _around.modes:
                outer.known.pop(value, None)
            with torch.enable_grad():
                _lose(value, who)
        return bool(left)


def _lose(value: Tensor, who: str) -> None:
    lost = Lost.apply(torch.empty(0, requires_grad=True), who, value)
    if lost is value:
        return
    try:
        torch.utils.swap_tensors(value, lost)
    except RuntimeError as error:
        raise BackwardError(f"{_text(who)}. From torch: {error}") from error


_CUTS = (Tensor.detach, Tensor.data.__get__, torch.detach)  # type: ignore[attr-defined]
"""What leaves the history of its argument."""


def _has_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _text(who: str) -> str:
    return (
        f"{who} computed a value that was kept elsewhere, and a loss depends on it; while a reversible branch runs "
        "there is no history, so its gradient would be lost. Let hooks keep what they are given, and modules what they "
        "compute as attributes, and compute from that after the model has run; or keep the block as it is with "
        "exclude=, or use reversible=False"
    )


class Lost(torch.autograd.Function):
    """The same values, with a history that cannot be followed."""

    @staticmethod
    def forward(ctx: Any, probe: Tensor, who: str, value: Tensor) -> Tensor:
        ctx.who = who
        if value._is_view():
            return value.detach()
        ctx.mark_dirty(value)
        return value

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        raise BackwardError(_text(ctx.who))
