"""Watched: what leaves a branch beside its value, since a hook saw it or a module kept it.

A branch first runs without gradients, so a tensor that a forward hook appends to a list, or a module stores as an
attribute (an auxiliary loss), would have no history, and a loss on it would be lost in silence.  So

1. while the branch runs, the tensors that its modules' hooks are given, and those that modules of other libraries than
   torch newly hold, are noted.  The step hands out these very tensors, by which they become part of the graph;
2. the recomputation notes the same ones again, by their place, and takes in their gradients;
3. what cannot be given another history (views, the branch's input) has a stand-in with the same memory: hooks see it,
   modules hold it, so that it can be joined (:mod:`mfx.run.beside`);
4. side effects happen once (M5): hooks that only look do not run again, and what a module kept is put back.  A hook of
   torch's own (sharding, pruning), or that returns something or changes a module, runs both times.  Hooks that were
   removed or added meanwhile are as they were.  What hooks compute: :mod:`mfx.run.watching`.

Known limits: hooks of modules that the capture entered do not run at all (a warning names them), and global hooks are
not seen.  Of attributes, tensors and lists, tuples and dicts of them are.
"""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mfx.errors import BackwardError
from mfx.run.watching import ran, stand_in
from mfx.sharding import is_distributed_hook
from mfx.torch_versions import pytree

Place = tuple[Any, ...]
"""Which of the values that leave a branch: the module's number, how it leaves, and the how manieth it is there."""

_TABLES = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")
_OWN = frozenset(nn.Module().__dict__)


class Watch:
    """What leaves the runs of one branch: ``places`` are those of the first run, ``found`` the tensors at each.

    ``apart``: the first run has no history; where it has one, as in a segment, all is part of the graph by itself.
    ``uncompiled``: what modules have compiled is run eagerly, in both runs.
    """

    def __init__(self, modules: Sequence[nn.Module], apart: bool = True) -> None:
        hooked = ((n, m) for n, m in enumerate(modules) if m._forward_hooks or m._forward_pre_hooks)
        self.hooked = [(n, m, {name: OrderedDict(m.__dict__[name]) for name in _TABLES}) for n, m in hooked]
        self.keeping = [(n, m) for n, m in enumerate(modules) if not type(m).__module__.startswith("torch.nn")]
        self.places: tuple[Place, ...] = ()
        self.found: dict[Place, Tensor] = {}
        self.modules, self.apart = modules, apart
        self._looking: set[tuple[nn.Module, int]] = set()
        self.uncompiled = False
        self._entry: Tensor | None = None
        self._instead: dict[int, Tensor] = {}
        self._originals: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def first(self) -> Iterator[None]:
        """Around the first run."""
        held = [_held(module) for _, module in self.keeping]
        with self._hooks(self._noting):
            yield
        with torch.enable_grad():
            self._stand_in_for_kept(held)
        self._note_kept(held)

    def enters(self, entry: Tensor, instead: Tensor | None, others: Sequence[Any]) -> None:
        """Within the first run: ``entry`` is the branch's input, ``others`` are its operands.

        Hooks see ``instead`` of the entry, if there is one.
        """
        self._entry = entry
        self._instead = {id(other): other for other in others if isinstance(other, Tensor)}
        self._instead |= {} if instead is None else {id(entry): instead}

    def taken(self, others: Sequence[Any]) -> list[Tensor]:
        """The tensors of the first run, each once, but for ``others``, which have a history of their own.

        What is computed from another comes after it, as far as that can be seen.
        """
        seen = {id(other) for other in others}
        taken = {}
        for place, tensor in sorted(self.found.items(), key=lambda item: self._age(item[1])):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                taken[place] = tensor
        self.places, self.found, self._originals, self._entry = tuple(taken), {}, {}, None
        return list(taken.values())

    def recomputed(self, block: str, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tensors of the recomputation at the places of the first run, of which some have gradients."""
        found, self.found = self.found, {}
        if not found.keys() >= set(self.places) and any(grad is not None for grad in grads):
            raise BackwardError(
                f"block {block!r}: a value that a hook saw, or a module kept, when the branch ran first did not come "
                "by when it ran again, so its gradient would be lost. Let hooks and modules do the same each time, or "
                f"keep the block as it is with exclude={block!r}"
            )
        return [found.get(place) for place in self.places]

    def stance(self) -> contextlib.AbstractContextManager[Any]:
        """Around the branch itself, in each run."""
        return torch.compiler.set_stance("force_eager") if self.uncompiled else contextlib.nullcontext()

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """Around the recomputation."""
        self.found = {}
        held = [_held(module) for _, module in self.keeping]
        try:
            with self._hooks(self._noting_again):
                yield
            self._note_kept(held)
        finally:
            for (_, module), before in zip(self.keeping, held, strict=True):
                _put_back(module, before)

    @contextlib.contextmanager
    def _hooks(self, wrapped: Callable[..., Any]) -> Iterator[None]:
        """With the hooks that the modules had in the first run, as ``wrapped(number, module, key, hook)``."""
        before = [(module, name, module.__dict__[name]) for _, module, tables in self.hooked for name in tables]
        try:
            for number, module, tables in self.hooked:
                for name, hooks in tables.items():
                    alone = name.endswith("kwargs")
                    own = (
                        (key, hook if alone or is_distributed_hook(hook) else wrapped(number, module, key, hook))
                        for key, hook in hooks.items()
                    )
                    module.__dict__[name] = OrderedDict(own)
            yield
        finally:
            for module, name, hooks in before:
                module.__dict__[name] = hooks

    def _noting(self, number: int, module: nn.Module, key: int, hook: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*given: Any) -> Any:
            given = (given[0], *pytree.tree_map_only(Tensor, self._stand_in, given[1:]))
            self._note((number, key), given[1:])
            before = _state(self.modules), versions_of(given)
            result = hook(*given) if is_torchs(hook) else ran(hook, module, given[1:], self.apart)
            if self.apart:
                _refuse_asked(module, hook, given)
            if result is None and before == (_state(self.modules), versions_of(given)) and not is_torchs(hook):
                self._looking.add((module, key))
            else:
                self._looking.discard((module, key))
            return result

        return noting

    def _noting_again(self, number: int, module: nn.Module, key: int, hook: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*given: Any) -> Any:
            self._note((number, key), given[1:])
            if (module, key) in self._looking:
                return None
            return hook(*given) if self.apart or is_torchs(hook) else ran(hook, module, given[1:], apart=False)

        return noting

    def _stand_in(self, value: Tensor) -> Tensor:
        """What hooks and modules get of a value: itself, unless it cannot be given another history later on."""
        if self.apart and id(value) not in self._instead and (value is self._entry or value._is_view()):
            self._instead[id(value)] = stand_in(value)
            self._originals[id(self._instead[id(value)])] = value
        return self._instead.get(id(value), value)

    def _age(self, value: Tensor) -> int:
        """A number that is larger for what is computed later, where values have histories."""
        original = self._originals.get(id(value), value)
        if original is self._entry:
            return -2
        return -1 if original.grad_fn is None else original.grad_fn._sequence_nr()

    def _stand_in_for_kept(self, held: list[dict[str, tuple[Any, Any]]]) -> None:
        """Replace what modules newly hold in the same way, where it has a history."""
        for (_, module), before in zip(self.keeping, held, strict=True):
            old = {id(leaf) for _, content in before.values() for leaf in pytree.tree_leaves(content)}
            for name, (value, _) in _held(module).items():
                _replace(
                    module,
                    name,
                    value,
                    lambda leaf, old=old: self._stand_in(leaf) if leaf.requires_grad and id(leaf) not in old else leaf,
                )
        self._instead = {}

    def _note(self, place: Place, values: Any) -> None:
        """Note the tensors among ``values``, after those that came before at this place."""
        for value in pytree.tree_leaves(values):
            if isinstance(value, Tensor) and value.is_floating_point():
                count = sum(other[:2] == place for other in self.found)
                self.found[(*place, count)] = value

    def _note_kept(self, held: list[dict[str, tuple[Any, Any]]]) -> None:
        """Note what modules hold now and did not before, where it has a history."""
        for (number, module), before in zip(self.keeping, held, strict=True):
            old = {id(leaf) for _, content in before.values() for leaf in pytree.tree_leaves(content)}
            now = pytree.tree_leaves([value for value, _ in _held(module).values()])
            new = [leaf for leaf in now if isinstance(leaf, Tensor) and leaf.requires_grad and id(leaf) not in old]
            self._note((number, "kept"), new)


def refuse_watched(block: str, values: Iterable[Callable[[], Any]]) -> None:
    """Raise where somebody waits for the whole gradient of a value that could not be joined (of a special kind).

    Hooks of torch's own wait for the moment, not for the value (sharding puts them on all outputs of a model).

    Args:
        block: the block's name.
        values: weak references to the values from inside its branch that somebody may hold.
    """
    for value in (reference() for reference in values):
        hooks = () if not isinstance(value, Tensor) else (value._backward_hooks or {}).values()
        if isinstance(value, Tensor) and (value.retains_grad or not all(map(is_torchs, hooks))):
            raise BackwardError(
                f"block {block!r}: a value from inside its branch, of shape {tuple(value.shape)}, which the model "
                "hands out or a hook kept, has a hook or retains its gradient. The reversible run has it beside "
                "the rest of its branch, so what comes through that would be missing (gradients of block outputs "
                f"are whole). Keep the block as it is with exclude={block!r}, or use reversible=False"
            )


def is_torchs(hook: Any) -> bool:
    """Whether a hook belongs to torch."""
    hook = hook.func if isinstance(hook, functools.partial) else hook
    return str(getattr(hook, "__module__", None) or type(hook).__module__).split(".")[0] == "torch"


def _refuse_asked(module: nn.Module, hook: Any, given: Any) -> None:
    """Raise where a forward hook asks for the gradient of what it is given, which becomes part of the graph later."""
    tensors = (leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, Tensor) and not leaf.is_leaf)
    if not is_torchs(hook) and any(tensor.retains_grad or tensor._backward_hooks for tensor in tensors):
        raise BackwardError(
            f"a forward hook of {type(module).__name__} calls retain_grad() or register_hook() on what it is given "
            "while the reversible run has no gradients there yet. Let the hook keep the tensor, and call these on it "
            "after the model has run; or keep the block as it is with exclude=, or use reversible=False"
        )


def versions_of(values: Any) -> list[int]:
    """How often each tensor among the values has been written to."""
    return [leaf._version for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _replace(module: nn.Module, name: str, value: Any, by: Callable[[Tensor], Tensor]) -> None:
    """Put other tensors into a module's attribute, a tensor or a container."""
    new = pytree.tree_map_only(Tensor, by, value)
    if all(one is other for one, other in zip(pytree.tree_leaves(value), pytree.tree_leaves(new), strict=True)):
        return
    if isinstance(value, list):
        value[:] = new
    elif isinstance(value, dict):
        value.update(new)
    else:
        module.__dict__[name] = new


def _state(modules: Sequence[nn.Module]) -> list[int]:
    """What modules hold, by identity."""
    tables = (table for m in modules for table in (m.__dict__, m._parameters, m._buffers, m._modules))
    return [id(value) for table in tables for name, value in table.items() if name not in _TABLES]


def _held(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """A module's attributes that are tensors, or containers that may hold some, with a copy of the container."""
    values = ((name, value) for name, value in module.__dict__.items() if name not in _OWN)
    return {
        name: (value, value if isinstance(value, Tensor) else type(value)(value))
        for name, value in values
        if isinstance(value, Tensor) or type(value) in (list, tuple, dict)
    }


def _put_back(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    """A module's attributes, and the contents of containers, as they were."""
    for name, (value, content) in before.items():
        if isinstance(value, list) and not _same(value, content):
            value[:] = content
        elif isinstance(value, dict) and not _same(value.values(), content.values()):
            value.clear()
            value.update(content)
        if module.__dict__.get(name) is not value:
            module.__dict__[name] = value
    for name in _held(module).keys() - before.keys():
        del module.__dict__[name]


def _same(values: Any, others: Any) -> bool:
    return len(values) == len(others) and all(one is other for one, other in zip(values, others, strict=True))
