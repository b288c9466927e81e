"""Segment: operations run so that what they save is recomputed in backward.

1. The segment runs under autograd.  What it saves is dropped, and made anew by a second run from its inputs, which ends
   with the last of it (:mod:`mfx.run.uninverted.dropped`).
2. The second run is under the conditions of the first (:mod:`mfx.run.conditions`), with its parameters, and with side
   effects left out (:mod:`mfx.run.watched`), so random masks are the same, and running statistics move once (M5, M6).
   What hooks compute is part of the graph, and what they save stays.
3. Inputs and parameters must be in backward what they were in forward (M8).
4. Where the plan says so, the inputs wait on the host meanwhile (:mod:`mfx.run.uninverted.offload`).

No inverse is needed, and no equal shapes.
Source: torch/utils/checkpoint.py (``use_reentrant=False``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn

from mfx.errors import BackwardError
from mfx.rule.step import StepSpec
from mfx.run.conditions import Autocast
from mfx.run.operands import Parameters, parameters_as_operands, refuse_moved, storages_of
from mfx.run.recompute import conditions_of
from mfx.run.uninverted.anew import Anew
from mfx.run.uninverted.dropped import KEEPING, Told, dropping
from mfx.run.uninverted.offload import offloaded
from mfx.run.watched import Watch, versions_of
from mfx.torch_versions import forward_derivative_is_on, functions_are_transformed


def recomputed(spec: StepSpec, root: nn.Module, *inputs: Any, told: Told = lambda off, dtype: None) -> tuple[Any, ...]:
    """The values of the segment ``spec`` of ``root``, which keeps for backward no more than its ``inputs``.

    ``told`` takes, in backward, how far its second run is from the first (:mod:`mfx.run.uninverted.dropped`).
    """
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    plain = torch.jit.is_tracing() or functions_are_transformed() or forward_derivative_is_on()  # pyright: ignore
    if plain or not tensors or not torch.is_grad_enabled():
        return spec.branch(root, *inputs)
    away = spec.offloaded is not None
    with offloaded(tensors, first=spec.offloaded == 0) if away else contextlib.nullcontext():
        runs = _Runs(spec, root, tensors[0], inputs)
        kept = [None if place in runs.moved else value for place, value in enumerate(inputs)]
        if spec.compiled:
            return Anew.apply(spec.name, runs.first, runs.again, *kept)  # type: ignore[return-value]
        return dropping(spec.name, runs.first, runs.again, kept, told)


class _Runs:
    """The runs of one segment: the first, and any number of others that are to be like it.

    ``moved`` are the running statistics among its inputs, by place: their values do not matter to what runs again.
    """

    def __init__(self, spec: StepSpec, root: nn.Module, like: Tensor, inputs: Sequence[Any]) -> None:
        self.spec = spec
        self.root = root
        self.moved = {1 + side: inputs[1 + side] for side in spec.statistics}
        self.parameters = Parameters.of(spec, root)
        self.conditions = conditions_of(spec, root, like, self.parameters.modules)
        self.autocast = Autocast.current(like.device)
        self.watch = Watch(self.parameters.modules, apart=False)
        self.versions = [tensor._version for tensor in self.parameters.tensors]
        self.storages = storages_of(self.parameters.tensors)

    def first(self, *inputs: Any) -> tuple[Any, ...]:
        """The run in forward."""
        versions = versions_of(inputs)
        with self.autocast(), self.conditions.recorded(), self._unseen(self.watch.first()):
            values = self.spec.branch(self.root, *self._whole(inputs))
        if versions != versions_of(inputs):
            raise BackwardError(
                f"block {self.spec.name!r}: its branch writes in place to x or to a value from outside it, so it "
                f"cannot be recomputed. Write to a copy (.clone()), or {KEEPING}"
            )
        return values

    def again(self, *inputs: Any) -> tuple[Any, ...]:
        """A run in backward."""
        self._refuse_changes()
        # Those of a sharded module are its own affair: its hooks exchange them, in both runs.
        whole = [type(tensor) in (Tensor, nn.Parameter) for tensor in self.parameters.tensors]
        own = parameters_as_operands(
            list(compress(self.parameters.owners, whole)), list(compress(self.parameters.tensors, whole))
        )
        unseen = self._unseen(self.watch.again())
        with self.conditions.restored(copies=True), self.autocast(), own, self.conditions.rewound(), unseen:
            return self.spec.again(self.root, *self._whole(inputs))

    def _whole(self, inputs: Sequence[Any]) -> list[Any]:
        return [self.moved.get(place, value) for place, value in enumerate(inputs)]

    @contextlib.contextmanager
    def _unseen(self, looking: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        """Hold none of the tensors that hooks see: they are in the graph anyway."""
        try:
            with looking:
                yield
        finally:
            self.watch.found = {}

    def _refuse_changes(self) -> None:
        parameters = self.parameters
        if parameters.units is not None:
            parameters.units.refuse_changed(self.spec.name)
        if [tensor._version for tensor in parameters.tensors] != self.versions:
            raise BackwardError(
                f"{self.spec.name}: a parameter was changed in place between forward and backward, so it cannot be "
                f"recomputed as it ran. Change parameters after backward, or {KEEPING}"
            )
        refuse_moved(self.spec.name, parameters.owners, parameters.tensors, self.storages)
