"""State: the momentum side of a model, its options and its graphs so far.

Each call looks up the rewritten graph that holds for it (its arguments, tensors aside, and the training flags and
settings of the modules), and captures the model anew where there is none.  A symbolic capture is proven at its first
call (:mod:`mfx.capture.proof`, M12).  Every graph must give the chains of the
first one: the function must not depend on the mode.  Graphs are bounded in number, all together; the one that was not
used for longest goes first.

Known limits: forward hooks on modules that the capture entered do not run (a warning names them).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mfx.capture import (
    Call,
    Captured,
    as_call,
    capture_dynamo,
    capture_symbolic,
    default_form,
    named_modules,
    prove,
)
from mfx.capture.symbolic import SymbolicCapture, capture_general, with_sizes
from mfx.compile.inside import new_token
from mfx.errors import CaptureError, HookWarning, InputTypeError, MfxError, PlanChangedError
from mfx.graph.notes import ADDED, STATE
from mfx.model.parts import refuse_replica
from mfx.options import Gamma, Options, check_gamma
from mfx.pipeline import Passed, momentumize_graph
from mfx.rewrite import ByRoot
from mfx.run import ChainSpec

_MOST_GRAPHS = 32


@dataclass(frozen=True, eq=False)
class Entry:
    """One captured and rewritten form of a model; ``proven`` says that the capture is known to be the model's."""

    captured: Captured
    passed: Passed
    proven: bool = False

    def run(self, root: nn.Module, call: Call) -> Any:
        """The model's output."""
        return self.captured.call(root, call, self.passed.rewritten.run)


class Momentum:
    """What makes a model a momentumized one.

    ``entries`` are its graphs, the one used last at the end; ``chains`` and ``places`` are those of the first graph;
    ``token`` is a text of its own for each model and each change of its options (:mod:`mfx.compile.inside`).
    """

    def __init__(self, original: type[nn.Module], options: Options) -> None:
        self.original = original
        self.options = options
        self.chains: tuple[tuple[str, ...], ...] | None = None
        self.places: dict[str, tuple[str, ...]] = {}
        self.entries: list[Entry] = []
        self.hooked: set[str] = set()
        self.token = new_token()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entries": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, token=new_token())

    def __deepcopy__(self, memo: dict[int, Any]) -> Momentum:
        twin = Momentum(self.original, self.options)
        twin.chains, twin.places = self.chains, self.places
        return twin

    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks that are rewritten."""
        return tuple(name for chain in self.chains or () for name in chain)

    def specs(self) -> tuple[ChainSpec, ...]:
        """The chains of all graphs so far."""
        return tuple(chain for entry in self.entries for chain in entry.passed.rewritten.chains)

    def latest(self) -> tuple[ChainSpec, ...]:
        """The chains of the graph used last."""
        return self.latest_entry().passed.rewritten.chains

    def latest_entry(self) -> Entry:
        """The graph used last."""
        if not self.entries:
            raise MfxError("the model has no captured graph yet: run it once")
        return self.entries[-1]

    def set_gamma(self, gamma: Gamma) -> None:
        """Run with another gamma from the next forward on."""
        options = replace(self.options, gamma=check_gamma(gamma))
        self.options, self.token = options, new_token()
        self.entries = [replace(entry, passed=entry.passed.with_options(options)) for entry in self.entries]

    def expected(self) -> tuple[tuple[str, ...], ...] | None:
        """The names of each chain's blocks, once the model has been captured."""
        return self.chains

    def velocities(self, root: nn.Module) -> list[nn.Module]:
        """The modules of the learned velocities, one for each chain."""
        return list(getattr(root, ADDED).values()) if hasattr(root, ADDED) else []

    def call(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the rewritten model."""
        refuse_replica(root)
        call = Call(args, kwargs)
        entry = self.entry(root, call)
        self.warn_of_hooks(entry, stacklevel=2)
        return entry.run(root, call)

    def warn_of_hooks(self, entry: Entry, stacklevel: int) -> None:
        """Tell, once for each module, that its hooks do not run."""
        hooked = [path for path in entry.captured.hooked if path not in self.hooked]
        if hooked:
            self.hooked.update(hooked)
            warnings.warn(
                f"forward or backward hooks on {', '.join(hooked)} will not run: their modules are part of the "
                f"captured graph of {self.original.__name__}. Hooks on the model itself and on modules taken whole "
                "do run",
                HookWarning,
                stacklevel=stacklevel + 1,
            )

    def entry(self, root: nn.Module, call: Call) -> Entry:
        """The graph for ``call``, in the modes the modules are in."""
        held = None
        for place in range(len(self.entries) - 1, -1, -1):
            entry = self.entries[place]
            if (entry.proven or self.options.capture != "dynamo") and entry.captured.holds(root, call):
                held = self.entries.pop(place)
                if held.proven:
                    self.entries.append(held)
                    return held
                break
        return self._by(
            lambda: self._proven(self._symbolic(root, call) if held is None else held, root, call),
            lambda: self._dynamo(root, call),
        )

    def first(self, root: nn.Module, example_inputs: Any) -> Entry:
        """The graph of the example's call; without one, of the call that forward's signature suggests."""
        if example_inputs is not None:
            return self.entry(root, as_call(example_inputs))

        def by_symbols() -> Entry:
            forward = self.original.forward
            captured = capture_symbolic(root, forward, default_form(forward), named_modules(root, self.options))
            return self._add(Entry(captured, self._passed(root, captured)))

        def by_dynamo() -> Entry:
            raise CaptureError("Dynamo captures a call: pass example_inputs= as the model's forward takes them")

        return self._by(by_symbols, by_dynamo)

    def _by(self, by_symbols: Callable[[], Entry], by_dynamo: Callable[[], Entry]) -> Entry:
        """By the capture that is asked for; where that is left open, by Dynamo as soon as symbols have failed."""
        if self.options.capture == "dynamo":
            return by_dynamo()
        try:
            return by_symbols()
        except CaptureError as error:
            if self.options.capture != "auto":
                raise
            refused = error
        try:
            entry = by_dynamo()
        except CaptureError as error:
            raise CaptureError(f"{refused}\nThe other way, Dynamo: {error}") from refused
        self.options = replace(self.options, capture="dynamo")
        return entry

    def _symbolic(self, root: nn.Module, call: Call) -> Entry:
        """A graph by symbolic tracing: for all values of a number that varies, if that gives the same chains."""
        forward, named = self.original.forward, named_modules(root, self.options)

        def entry_of(captured: SymbolicCapture) -> Entry:
            captured = with_sizes(captured, root, call) if self.options.shapes else captured
            return Entry(captured, self._passed(root, captured))

        general = capture_general(root, forward, call, named, [entry.captured for entry in self.entries])
        if general is not None:
            entry = entry_of(general)
            if entry.passed.plan.names == self.chains:
                return entry
        return entry_of(capture_symbolic(root, forward, call.form, named))

    def _proven(self, entry: Entry, root: nn.Module, call: Call) -> Entry:
        """The entry, which is used from now on: its capture is the model's, or nothing can be said of it yet.

        Raises:
            CaptureError: it is not; then what was planned by it is forgotten, as long as nothing has run.
        """
        assert isinstance(entry.captured, SymbolicCapture)
        try:
            proven = prove(root, self.original.forward, entry.captured, call)
        except CaptureError:
            if not any(other.proven for other in self.entries) and not self.velocities(root):
                self.chains, self.places = None, {}
            raise
        return self._add(replace(entry, proven=proven))

    def _dynamo(self, root: nn.Module, call: Call) -> Entry:
        captured = capture_dynamo(root, self.original.forward, call, named_modules(root, self.options))
        return self._add(Entry(captured, self._passed(root, captured), proven=True))

    def _passed(self, root: nn.Module, captured: Captured) -> Passed:
        return momentumize_graph(captured.graph, root, self.options, ByRoot())

    def _add(self, entry: Entry) -> Entry:
        self._same_chains(entry)
        self.entries = [*self.entries[1 - _MOST_GRAPHS :], entry]
        return entry

    def _same_chains(self, entry: Entry) -> None:
        """A model must compute one function: chains that differ from the first capture's are an error."""
        places = entry.passed.plan.places
        if self.chains is None:
            self.chains, self.places = entry.passed.plan.names, places
            return
        for name, chain in places.items():
            before = self.places.get(name, chain)
            if before != chain:
                raise PlanChangedError(
                    f"captured for this call or mode, block {name!r} is {_place(chain)}; at first it was "
                    f"{_place(before)}. The model would compute another function: exclude these blocks, or "
                    "momentumize it in the mode and with the arguments you use"
                )


def _place(chain: tuple[str, ...]) -> str:
    return f"in the chain {list(chain)}" if chain else "kept as it is"


def momentum_of(mm: nn.Module) -> Momentum:
    """The momentumized side of a model."""
    momentum = mm.__dict__.get(STATE)
    if not isinstance(momentum, Momentum):
        raise InputTypeError(f"{type(mm).__name__} is not a momentumized model: call mfx.momentumize on it first")
    return momentum
