"""State: the momentum side of a model, its options and its graphs so far.

Each call looks up the rewritten graph that holds for it (its arguments, tensors aside, and the modes of modules), and
captures the model anew where there is none.  A symbolic capture is proven at its first call (M12).  Every graph must
give the chains of the first one.  Graphs are bounded in number; the one not used for longest goes first.
Known limits: forward hooks on modules that the capture entered do not run (a warning names them).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

from torch import nn

from mfx.capture import Call, Captured, as_call, capture_dynamo, capture_symbolic, default_form, prove
from mfx.capture.call import Form, refuse_strided
from mfx.capture.exported import is_exporting
from mfx.capture.symbolic import SymbolicCapture, varied, with_sizes
from mfx.capture.tracer import following
from mfx.compile.live import Live, new_token
from mfx.errors import CaptureError, MfxError
from mfx.graph.notes import ADDED
from mfx.model.checkpointing import switched_off
from mfx.model.foreign import Hooked, captured_around, general_around
from mfx.model.linked import Links
from mfx.model.parts import Origin, refuse_replaced, refuse_replica, refuse_tracing, refuse_without_call, without_added
from mfx.options import Gamma, Options, check_gamma, gamma_of
from mfx.pipeline import WHOLE, Passed, Place, momentumize_graph, refuse_other_places
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

    ``method`` of it is what its graphs stand for; ``guarded`` methods and ``inner`` modules run a part of that.
    ``entries`` are its graphs, the one used last at the end; ``chains`` and ``places`` are those of the first graph;
    ``decisive`` are the places of numbers by which the model's Python decides, so that each value has its own graph;
    ``token``, ``stamp`` and ``compiled`` are those of :class:`mfx.compile.live.Traceable`; ``holders`` are the modules
    that have it; ``origin`` is what it was copied of, ``links`` are what it has in common with others.
    """

    def __init__(
        self, original: type[nn.Module], options: Options, place: Place = WHOLE, method: str = "forward"
    ) -> None:
        self.original = original
        self.options = options
        self.place = place
        self.method = method
        self.guarded: tuple[str, ...] = ()
        self.inner: dict[str, tuple[str, ...]] = {}
        self.places: dict[str, tuple[str, ...]] = {}
        self.chains: tuple[tuple[str, ...], ...] | None = None
        self.entries: list[Entry] = []
        self.decisive: set[Any] = set()
        self.hooked = Hooked(original, place.prefix)
        self.recorded: list[Call] | None = None
        self.token, self.stamp, self.sharded, self.links = new_token(), "", dict[str, int](), Links()
        self.compiled: WeakSet[Live] = WeakSet()
        self.holders: WeakSet[nn.Module] = WeakSet()
        self.origin: Origin | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "entries": [], "decisive": set(), "holders": None, "compiled": None, "origin": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, token=new_token(), compiled=WeakSet(), holders=WeakSet())

    def __deepcopy__(self, memo: dict[int, Any]) -> Momentum:
        twin = type(self)(self.original, self.options, self.place, self.method)
        twin.guarded, twin.inner, twin.stamp = self.guarded, self.inner, self.stamp
        twin.chains, twin.places, twin.sharded = self.chains, self.places, dict(self.sharded)
        twin.origin, twin.links = Origin(self), copy.deepcopy(self.links, memo)
        return twin

    @property
    def function(self) -> Callable[..., Any]:
        """What is captured: the original's forward, or the method of it that runs the chains."""
        return getattr(self.original, self.method)

    def expect(self, chains: tuple[tuple[str, ...], ...], places: dict[str, tuple[str, ...]]) -> None:
        """Fix the chains (names of their blocks) that every graph has to have, and where each residual add is."""
        self.chains, self.places = chains, places
        self.note_moving()

    def note_moving(self) -> None:
        """Note which blocks are another function than the model's own."""
        self.stamp = " ".join(name for name in self.blocks() if self.options.moves(name))
        if self.linked:
            self.links.note(self.place.prefix, [gamma_of(self.options.gamma, name) for name in self.blocks()])

    def blocks(self) -> tuple[str, ...]:
        """The names of the blocks that are rewritten."""
        return tuple(name for chain in self.chains or () for name in chain)

    def specs(self) -> tuple[ChainSpec, ...]:
        """The chains of all graphs so far."""
        compiled = (chain for live in self.compiled for chain in live.chains)
        return (*compiled, *(chain for entry in self.entries for chain in entry.passed.rewritten.chains))

    def latest(self) -> tuple[ChainSpec, ...]:
        """Those of the graph used last."""
        return self.latest_entry().passed.rewritten.chains

    def latest_entry(self) -> Entry:
        """The graph used last."""
        if not self.entries:
            raise MfxError("the model has no captured graph yet: run it once")
        return self.entries[-1]

    def set_gamma(self, gamma: Gamma) -> None:
        """Run with another gamma from the next forward on."""
        self.set_options(replace(self.options, gamma=check_gamma(gamma)))

    def set_options(self, options: Options) -> None:
        """Run with another gamma, or within another budget, from the next forward on."""
        if self.options.activation_budget is not None or replace(self.options, gamma=options.gamma) != options:
            self.token = new_token()
        self.options = options
        self.note_moving()
        self.entries = [replace(entry, passed=entry.passed.with_options(options)) for entry in self.entries]

    def expected(self) -> tuple[tuple[str, ...], ...] | None:
        """The names of each chain's blocks, once the model has been captured."""
        return self.chains

    @property
    def linked(self) -> bool:
        """Whether the model's own Python joins its chains to those of others."""
        return self.links.scope is not None

    def added(self, root: nn.Module) -> dict[str, list[nn.Module]]:
        """The modules that give velocities and gammas, one for each chain."""
        return {name: list(root._modules[name].children()) for name in ADDED if name in root._modules}  # type: ignore[union-attr]

    def call(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the rewritten model."""
        refuse_replica(root)
        call = Call(args, kwargs)
        if self.recorded is not None:
            self.recorded.append(call)
            with following(self):
                return self.function(root, *args, **kwargs)
        refuse_tracing(root, call.leaves)
        if self.origin is not None:
            self.origin.compare(self)
        with switched_off(root), self.links.within(self.place.prefix):
            entry = self.entry(root, call)
            self.hooked.tell(root, entry.captured.hooked, stacklevel=2)
            return entry.run(root, call)

    def entry(self, root: nn.Module, call: Call) -> Entry:
        """The graph for ``call``, in the modes the modules are in."""
        refuse_strided(self.function, call)
        with without_added(root):
            found = self._entry(root, call)
        return self._budgeted(found, root, call)

    def _entry(self, root: nn.Module, call: Call) -> Entry:
        held = None
        for place, entry in reversed([*enumerate(self.entries)]):
            if (entry.proven or self.options.capture != "dynamo") and entry.captured.holds(root, call):
                held = self.entries.pop(place)
                if held.proven:
                    self.entries.append(held)
                    return held
                break
        refuse_replaced(root, self.inner, self.place.prefix)
        return self._by(
            lambda: self._proven(self._symbolic(root, call) if held is None else held, root, call),
            lambda: self._dynamo(root, call),
        )

    def first(self, root: nn.Module, example_inputs: Any) -> Entry:
        """The graph of the example's call; without one, of the call that forward's signature suggests."""
        if example_inputs is not None:
            with switched_off(root):
                return self.entry(root, as_call(example_inputs))

        return self._by(lambda: self.capture_form(root, default_form(self.function)), refuse_without_call)

    def capture_form(self, root: nn.Module, form: Form, call: Call | None = None) -> Entry:
        """The graph of calls of ``form``, of which ``call`` may be one that gives shapes, by symbolic tracing."""
        captured = self._by_symbols(root, form)
        captured = captured if call is None else with_sizes(captured, root, call)
        return self._add(Entry(captured, self._passed(root, captured)))

    def _captured(self, root: nn.Module, capture: Callable[..., Any]) -> Any:
        """By ``capture(named, called)``; from now on what is sharded is taken whole, where that has to be."""
        prefix, passed = self.place.prefix, self._passed
        found = captured_around(root, self.options, prefix, self.chains, capture, lambda one: passed(root, one).plan)
        if found.whole:
            self.options, self.token, self.sharded = found.options, new_token(), {**self.sharded, **found.whole}
        return found.captured

    def _by_symbols(self, root: nn.Module, form: Form) -> SymbolicCapture:
        return self._captured(root, lambda *modules: capture_symbolic(root, self.function, form, *modules))

    @contextlib.contextmanager
    def recording(self) -> Iterator[list[Call]]:
        """Run the original forward meanwhile, and note its calls."""
        self.recorded = calls = []
        try:
            yield calls
        finally:
            self.recorded = None

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

        def entry_of(captured: SymbolicCapture) -> Entry:
            captured = with_sizes(captured, root, call) if self.options.shapes else captured
            return Entry(captured, self._passed(root, captured))

        places = varied((entry.captured for entry in self.entries), root, call)
        if places and (call.spec, places) not in self.decisive:
            known, prefix = self.chains or (), self.place.prefix
            general = general_around(root, self.function, call, places, self.options, prefix, known)
            entry = None if general is None else entry_of(general)
            if entry is not None and entry.passed.plan.names == self.chains:
                return entry
            self.decisive.add((call.spec, places))
        return entry_of(self._by_symbols(root, call.form))

    def _proven(self, entry: Entry, root: nn.Module, call: Call) -> Entry:
        """The entry, which is used from now on: its capture is the model's, or nothing can be said of it yet.

        Raises:
            CaptureError: it is not; then what was planned by it is forgotten, as long as nothing has run.
        """
        assert isinstance(entry.captured, SymbolicCapture)
        try:
            proven = prove(root, self.function, entry.captured, call)
        except CaptureError:
            if not any(other.proven for other in self.entries) and not self.added(root):
                self.chains, self.places = None, {}
            raise
        return self._add(replace(entry, proven=proven))

    def _dynamo(self, root: nn.Module, call: Call) -> Entry:
        captured = self._captured(root, lambda *modules: capture_dynamo(root, self.function, call, *modules))
        return self._add(Entry(captured, self._passed(root, captured), proven=True), keep=not is_exporting())

    def _passed(self, root: nn.Module, captured: Captured) -> Passed:
        return momentumize_graph(captured.graph, root, self.options, ByRoot(), place=self.place, before=self.places)

    def _budgeted(self, entry: Entry, root: nn.Module, call: Call) -> Entry:
        """The entry used last, planned for ``call`` if a budget is asked for and it has no plan yet."""
        if self.options.activation_budget is None or entry.passed.plan.forecast is not None or is_exporting():
            return entry
        planned = replace(entry, passed=entry.passed.within(root, entry.captured.inputs(root, call)))
        self.entries[-1] = planned
        return planned

    def _add(self, entry: Entry, keep: bool = True) -> Entry:
        """A model must compute one function: chains that differ from the first capture's are an error."""
        places = entry.passed.plan.places
        if self.chains is None:
            self.expect(entry.passed.plan.names, places)
        refuse_other_places(self.places, places)
        if keep:
            self.entries = [*self.entries[1 - _MOST_GRAPHS :], entry]
        return entry
