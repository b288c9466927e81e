"""The pass as a backend of torch.compile.

    net = torch.compile(model, backend=mfx.backend(gamma=0.9))
    net = torch.compile(model, backend="mfx", options={"gamma": 0.9})

1. Dynamo hands over a graph of torch operations whose parameters are inputs.
2. Its chains of residual blocks are rewritten (:mod:`mfx.pipeline`), each as one operation on tensors.
3. Their branches, and what lies between them, go to another backend (:mod:`mfx.compile.pieces`).

Block names are module paths relative to the compiled model; where a compiled function calls several models, the
name it has for each comes first.
Known limits: no learned velocity and no ``modules=``: use :func:`mfx.momentumize` and compile its result.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from mfx.capture.lifted import prepare
from mfx.compile.breaks import refuse_parts
from mfx.compile.pieces import in_pieces, is_dynamic
from mfx.compile.stand_ins import stand_ins
from mfx.errors import InputTypeError, NothingRewrittenWarning, OptionError
from mfx.options import Gamma, Options, make_options
from mfx.pipeline import Passed, momentumize_graph
from mfx.rewrite import Branches, Lifted
from mfx.torch_versions import dynamo

Inner = str | Callable[..., Any]


@dataclass(frozen=True)
class Backend:
    """A backend of torch.compile that rewrites the graph and hands it on; see :func:`backend`."""

    options: Options
    inner: Inner
    graph_breaks: bool = False

    @property
    def __name__(self) -> str:
        return "mfx"

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any], **kwargs: Any) -> Callable[..., Any]:
        """Compile what Dynamo hands over; ``kwargs`` (``mode``, ``options``) go to the inner backend."""
        if not self.graph_breaks:
            refuse_parts(gm)

        def inner(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
            return _inner(self.inner)(gm, list(example_inputs), **kwargs)

        branches = Branches.by(inner, is_dynamic(example_inputs))
        passed = rewrite_graph(gm, example_inputs, self.options, branches)
        if not passed.plan.chains and not passed.plan.segments:
            reasons = sorted({row.text for row in passed.plan.rejections})
            why = "; ".join(reasons[:3]) if reasons else "it has no residual add"
            warnings.warn(
                f"nothing was rewritten in a compiled graph ({why}): it is compiled as it is",
                NothingRewrittenWarning,
                stacklevel=2,
            )
            return inner(gm, example_inputs)
        return in_pieces(passed.rewritten.run, branches)  # type: ignore[arg-type]


def backend(gamma: Gamma = 0.9, inner: Inner = "inductor", *, graph_breaks: bool = False, **options: Any) -> Backend:
    """The pass as a backend of torch.compile.

    Args:
        gamma: as for :func:`mfx.momentumize`.
        inner: the backend that compiles branches, and what lies between chains: a name
            (``torch.compiler.list_backends()``), or a callable ``inner(graph_module, example_inputs)``.
        graph_breaks: a model that Dynamo breaks into several graphs is refused, since each part's chains start with
            a velocity of their own, so that the function would depend on the breaks.  True accepts that.
        **options: ``include``, ``exclude``, ``velocity`` (``"zero"`` or ``"first"``), ``reversible``,
            ``state_dtype``, ``tolerance``, ``activation_budget``, as for :func:`mfx.momentumize`.

    Returns:
        What ``torch.compile`` takes as ``backend=``.

    Raises:
        OptionError: an option has a value that cannot be used here.
        InputTypeError: ``inner`` is neither a name nor callable.

    Example:
        >>> import torch, mfx
        >>> class Block(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> model = torch.nn.Sequential(Block(4, 4), Block(4, 4))
        >>> net = torch.compile(model, backend=mfx.backend(gamma=0.9, inner="eager"))
        >>> net(torch.randn(2, 4)).shape
        torch.Size([2, 4])
    """
    if not (isinstance(inner, str) or callable(inner)):
        raise InputTypeError(f"inner must be a backend's name or a callable, not {type(inner).__name__}")
    chosen = make_options(gamma, **options)
    if chosen.learned:
        named = "velocity" if callable(chosen.velocity) else "gamma"
        raise OptionError(
            f"a learned {named}= has parameters, and a backend has no model to register them on: use "
            f"torch.compile(mfx.momentumize(model, {named}=...)), or velocity='zero' or 'first' and a float for gamma"
        )
    if chosen.modules or chosen.granularity != "add":
        named = "modules=" if chosen.modules else f"granularity={chosen.granularity!r}"
        raise OptionError(
            f"{named} needs modules that are taken whole, and a compiled graph has none: leave it out, or compile "
            "what mfx.momentumize(model, ...) gives"
        )
    return Backend(chosen, inner, bool(graph_breaks))


def entry_point(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | None = None, **kwargs: Any
) -> Callable[..., Any]:
    """``torch.compile(model, backend="mfx", options={...})``, the options being those of :func:`backend`."""
    return backend(**(options or {}))(gm, example_inputs, **kwargs)


def rewrite_graph(gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, branches: Branches) -> Passed:
    """Rewrite a graph that Dynamo handed over; ``gm`` keeps its nodes, which get their notes."""
    prepare(gm, example_inputs)
    binding = Lifted(gm, branches)
    passed = momentumize_graph(gm.graph, gm, options, binding)
    if options.activation_budget is not None:
        passed = passed.within(gm, stand_ins(gm.graph, example_inputs), binding)
    return passed


def _inner(inner: Inner) -> Callable[..., Any]:
    return dynamo().lookup_backend(inner)
