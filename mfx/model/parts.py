"""Parts: the modules of a model that run momentum chains, and what can be asked of all of them at once.

A *part* is a momentumized module or a :class:`mfx.MomentumNet`, anywhere in a model; it is recognized by its state,
:class:`Part`, under the name :data:`mfx.graph.notes.STATE`.  A block of a part has a name in the whole model: that of
the part's module, a dot, and the block's name in the part.
"""

from __future__ import annotations

import contextlib
import glob
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn, Protocol
from weakref import ref

from torch import fx, nn

from mfx.errors import CaptureError, InputTypeError, OptionError, PlanChangedError, StaleGammaWarning
from mfx.graph.notes import ADDED, GUARD, STATE
from mfx.options import Gamma, Options, check_gamma, gamma_of, refuse_gamma
from mfx.pipeline import Place
from mfx.run import ChainSpec


class Part(Protocol):
    """The momentum side of one module; ``place`` says where the module stands in the model that blocks are named in."""

    options: Options

    @property
    def place(self) -> Place: ...

    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks that are rewritten, as far as the module has been captured."""
        ...

    def specs(self) -> tuple[ChainSpec, ...]:
        """The chains of all captures so far, the latest last."""
        ...

    def latest(self) -> tuple[ChainSpec, ...]:
        """The chains of the latest capture."""
        ...

    def set_gamma(self, gamma: Gamma) -> None:
        """Run with another gamma from the next forward on."""
        ...


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The parts of a model, by the path of their modules.

    Raises:
        InputTypeError: there is none.
    """
    found = {path: module.__dict__[STATE] for path, module in model.named_modules() if STATE in module.__dict__}
    if not found:
        raise InputTypeError(f"{type(model).__name__} is not a momentumized model: call mfx.momentumize on it first")
    return found


def refuse_replica(module: nn.Module) -> None:
    """Raise for a copy that ``torch.nn.DataParallel`` made: it has no parameters, and would get no gradients."""
    if module.__dict__.get("_is_replica"):
        raise InputTypeError(
            f"{type(module).__name__} runs momentum chains, which torch.nn.DataParallel's copies of a model cannot: "
            "they have no parameters of their own. Use torch.nn.parallel.DistributedDataParallel"
        )


def refuse_tracing(module: nn.Module, leaves: Iterable[Any]) -> None:
    """Raise for a call with symbolic values, which ``torch.fx.symbolic_trace`` makes."""
    if any(isinstance(leaf, fx.Proxy) for leaf in leaves):
        raise CaptureError(
            f"{type(module).__name__} is momentumized and cannot be traced symbolically: take mfx.graph_of(mm). What "
            "is made by tracing (a feature extractor, a quantized model) has to be made of the original, and then be "
            "momentumized"
        )


class Origin:
    """The momentum side that another one is a copy of.

    A copy has the gamma of when it was made, and from then on its own: averaged weights (EMA) of a model whose gamma
    moves would be those of another network, if nobody moved the copy's.
    """

    def __init__(self, side: Any) -> None:
        self._side = ref(side)
        self._gamma = side.options.gamma

    def compare(self, copy: Any) -> None:
        """Tell, once, that the copy still has the first gamma, and the model that it is of another."""
        side = self._side()
        if side is None or _same(side.options.gamma, self._gamma) or not _same(copy.options.gamma, self._gamma):
            return
        warnings.warn(
            f"this copy of {copy.original.__name__} has gamma={self._gamma!r}, as when it was made, and the model it "
            f"was copied of has gamma={side.options.gamma!r} now. Averaged weights (EMA) belong to the gamma of their "
            "model: call mfx.set_gamma(copy, gamma) as well",
            StaleGammaWarning,
            stacklevel=4,
        )
        copy.origin = None


def _same(one: Any, other: Any) -> bool:
    """Whether two gammas are the same; of tensors, whether they are the same objects."""
    return one is other or (isinstance(one, (float, tuple)) and type(one) is type(other) and one == other)


def refuse_without_call() -> NoReturn:
    """Raise where no call is known that Dynamo could capture, or that shows what a model's own Python links."""
    raise CaptureError(
        "Dynamo captures a call, and blocks between which Python looks at values are found in one: pass "
        "example_inputs= as the model's forward takes them"
    )


def is_guarded(module: nn.Module) -> bool:
    """Whether a module has a guard (:mod:`mfx.model.inner.guard`), by its class or by one that this was made of."""
    return hasattr(type(module), GUARD)


def guarded_in(root: nn.Module) -> dict[str, tuple[str, ...]]:
    """What stands where in ``root``: each guarded module, by the paths that its guard knows."""
    places = root.named_modules(remove_duplicate=False)
    return {path: getattr(module, GUARD).paths for path, module in places if is_guarded(module)}


def refuse_replaced(root: nn.Module, places: dict[str, tuple[str, ...]], prefix: str = "") -> None:
    """Raise where something else than ``places`` say stands in the place of what had a guard: the original has that."""
    held = dict(root.named_modules(remove_duplicate=False))
    for path, paths in places.items():
        name = ".".join(filter(None, (prefix, path)))
        guard = getattr(held.get(path), GUARD, None)
        if path in held and (guard is None or guard.paths != paths):
            raise PlanChangedError(
                f"block {name!r} was replaced ({type(held[path]).__name__} stands "
                "there now) after it became part of a chain of momentum steps: put the new one into the original "
                "model, and momentumize that"
            )


def set_gamma(mm: nn.Module, gamma: Gamma) -> None:
    """Change gamma of a momentumized model in place, for annealing; takes effect at the next forward.

    Args:
        mm: a momentumized model, a :class:`mfx.MomentumNet`, or a model with such parts.
        gamma: as for :func:`mfx.momentumize`; a mapping's patterns match the names that blocks have in ``mm``.

    Raises:
        InputTypeError: ``mm`` has no momentumized part.
        OptionError: a gamma outside [-1, 1), or a mapping that gives no gamma to a block that is rewritten.

    Example:
        >>> import torch, torchvision, mfx
        >>> mm = mfx.momentumize(torchvision.models.resnet18(weights=None), gamma=0.0)
        >>> mfx.set_gamma(mm, 0.5)
    """
    checked = check_gamma(gamma)
    if callable(checked):
        raise InputTypeError(
            f"gamma must be a float in [-1, 1) or a mapping from block-name pattern to float, not "
            f"{type(gamma).__name__}: tensors, and modules that give gamma, are for momentumize(model, gamma=...)"
        )
    parts = parts_of(mm)
    for part in parts.values():
        refuse_gamma(part.options)
    left_out = [
        name for path, part in parts.items() for name in full_names(path, part) if gamma_of(checked, name) is None
    ]
    if left_out:
        raise OptionError(
            f"gamma={gamma!r} gives no value to blocks {sorted(left_out)}, which are rewritten: add a pattern for them"
        )
    for path, part in parts.items():
        part.set_gamma(_within(path, part, checked) if path and isinstance(checked, tuple) else gamma)


def _base(path: str, part: Part) -> str:
    """What comes before the names that a part gives, which begin at the model that it was made in."""
    prefix = part.place.prefix
    if not prefix or not (path == prefix or path.endswith(f".{prefix}")):
        return f"{path}." if path and not prefix else ""
    return path.removesuffix(prefix)


def full_names(path: str, part: Part) -> list[str]:
    """The names of a part's blocks in the whole model."""
    return [f"{_base(path, part)}{name}" for name in part.blocks()]


def _within(path: str, part: Part, gamma: tuple[tuple[str, float], ...]) -> dict[str, float]:
    """What a mapping over the names in the whole model says about the blocks of one part."""
    values = (gamma_of(gamma, name) for name in full_names(path, part))
    return {glob.escape(name): value for name, value in zip(part.blocks(), values, strict=True) if value is not None}


def drift(mm: nn.Module) -> dict[str, float]:
    """How far each chain's last backward was from what is known of its state, relative; see :mod:`mfx.run.detector`.

    Where it passes the tolerance, a :class:`mfx.DriftWarning` has said so.  This waits for values that are still
    on their way from a device.

    Args:
        mm: a momentumized model, a :class:`mfx.MomentumNet`, or a model with such parts.

    Returns:
        The drift of each chain that has run a backward, by name; the largest where there are several graphs.

    Raises:
        InputTypeError: ``mm`` has no momentumized part.

    Example:
        >>> import torch, torchvision, mfx
        >>> mm = mfx.momentumize(torchvision.models.resnet18(weights=None), gamma=0.9)
        >>> mm(torch.randn(2, 3, 64, 64)).sum().backward()
        >>> max(mfx.drift(mm).values()) < 1e-4
        True
    """
    found: dict[str, float] = {}
    for path, part in parts_of(mm).items():
        for chain in part.specs():
            chain.drift.poll(wait=True)
            value = chain.drift.value
            name = f"{_base(path, part)}{chain.name}"
            if value is not None:
                found[name] = max(value, found.get(name, value))
    return found


@contextlib.contextmanager
def without_added(root: nn.Module) -> Iterator[None]:
    """A module without the children that were added: ``nn.Sequential``, say, would run them."""
    added = {name: root._modules.pop(name) for name in ADDED if name in root._modules}
    try:
        yield
    finally:
        root._modules.update(added)
