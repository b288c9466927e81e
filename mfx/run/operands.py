"""Operands: the parameters of a step as its modules hold them at this call, and no gradient of theirs lost (M15).

1. At each call the modules that the branch calls are asked for their parameters, and so are the names that the branch
   reads by itself.  A tensor held under several names is one operand: tied and untied weights come out as they now are.
2. For the recomputation the operands are put where they were, if the modules hold others by then.
3. The recomputed branch's graph may end in the operands only.  Any other leaf that needs a gradient is one that would
   get none: a parameter that something put in place while the branch ran, or that no module holds.  That is looked at
   the first time a step is differentiated, and whenever an operand comes out without gradient.
4. Parameters that FSDP2 shards are no operands (:mod:`mfx.sharding`).

Known limits: a leaf of point 3 that joins a step later on, while all operands get gradients, is not seen.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.nn.parameter import is_lazy

from mfx.errors import BackwardError, InputTypeError
from mfx.rule.step import StepSpec
from mfx.sharding import Units, refuse_partitioned
from mfx.torch_versions import pytree

Owner = tuple[nn.Module, str]


@dataclass(frozen=True, eq=False)
class Parameters:
    """The parameters of a step at one call: ``modules`` are called by its branch; each tensor has its owners.

    ``units`` are those of the modules that FSDP2 shards, whose parameters are not among them.
    """

    modules: tuple[nn.Module, ...]
    tensors: tuple[Tensor, ...]
    owners: tuple[tuple[Owner, ...], ...]
    units: Units | None = None

    @staticmethod
    def of(step: StepSpec, root: nn.Module) -> Parameters:
        """As the modules of ``root`` hold them now."""
        modules = modules_of([step], root)
        units = Units.of(modules)
        places = {(module, name): None for module in modules for name in module._parameters}
        # What the branch reads by itself, and parameters that a wrapper turned into plain attributes.
        places.update({(submodule(root, path), name): None for names in step.parameters for path, name in names})
        found: dict[int, tuple[Tensor, list[Owner]]] = {}
        for module, name in places:
            if units is not None and units.hold(module, name):
                continue
            value = _holder(module, name).get(name)
            if isinstance(value, Tensor):
                refuse_partitioned(step.name, value)
                found.setdefault(id(value), (value, []))[1].append((module, name))
        tensors = tuple(tensor for tensor, _ in found.values())
        return Parameters(modules, tensors, tuple(tuple(owners) for _, owners in found.values()), units)


def modules_of(steps: Sequence[StepSpec], root: nn.Module) -> tuple[nn.Module, ...]:
    """The modules that branches call whole, with all inside them."""
    paths = [path for step in steps for path in step.modules]
    if len(paths) == 1:
        return tuple(submodule(root, paths[0]).modules())
    return tuple({module: None for path in paths for module in submodule(root, path).modules()})


def submodule(root: nn.Module, path: str) -> nn.Module:
    """The module at a dotted path, without the checks of ``get_submodule``: this runs for every block and step."""
    for name in path.split(".") if path else ():
        root = root._modules[name]  # type: ignore[assignment]
    return root


def _holder(module: nn.Module, name: str) -> dict[str, Any]:
    """Where a module has a tensor of this name: FSDP and the like turn parameters into plain attributes."""
    return module._parameters if name in module._parameters else module.__dict__


@contextlib.contextmanager
def parameters_as_operands(
    owners: Sequence[Sequence[Owner]], operands: Sequence[Any], apart: bool = False
) -> Iterator[list[Tensor]]:
    """Run with ``operands`` as the modules' parameters; gives the tensors to differentiate by.

    Each operand may be owned under several names.  Where the modules still hold the operand itself, and it is a leaf,
    that is the parameter.  Where not (the forward ran inside ``torch.func.functional_call``, say), or gradients are
    to be kept ``apart`` from those that the parameter has, an alias takes its place meanwhile.  Tensor hooks of
    parameters are silent meanwhile: they run once, when the gradient arrives outside.
    """
    leaves: list[Tensor] = []
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    hooks: list[tuple[Tensor, Any]] = []
    try:
        for names, operand in zip(owners, operands, strict=True):
            own = not apart and operand.is_leaf
            if own and all(_holder(module, name).get(name) is operand for module, name in names):
                leaves.append(operand)
                if operand._backward_hooks:
                    hooks.append((operand, operand._backward_hooks))
                    operand._backward_hooks = None
                continue
            leaves.append(operand.detach().requires_grad_(operand.requires_grad))
            for module, name in names:
                holder = _holder(module, name)
                swapped.append((holder, name, holder.get(name)))
                holder[name] = leaves[-1]
        yield leaves
    finally:
        for tensor, hook in hooks:
            tensor._backward_hooks = hook
        for holder, name, held in reversed(swapped):
            holder[name] = held


def storages_of(tensors: Sequence[Any]) -> tuple[int | None, ...]:
    """Which storage each tensor's values lie in; None where that cannot be told.

    Storage that was freed and filled anew meanwhile, as FSDP does it, is the same one elsewhere in memory.
    """
    plain = (type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta for tensor in tensors)
    return tuple(t.untyped_storage()._cdata if told else None for t, told in zip(tensors, plain, strict=True))


def refuse_lazy(steps: Sequence[StepSpec], operands: Sequence[Sequence[Any]]) -> None:
    """Raise where a parameter has no shape yet."""
    for step, group in zip(steps, operands, strict=True):
        if any(is_lazy(operand) for operand in group):
            raise InputTypeError(
                f"block {step.name!r} has a lazy module whose parameters have no shape yet: run the model once without "
                "gradients (torch.no_grad()) first"
            )


def refuse_moved(
    block: str, owners: Sequence[Sequence[Owner]], tensors: Sequence[Any], before: Sequence[int | None]
) -> None:
    """Raise where a module's parameter has other values than ``before``, when its storage was this one."""
    for ((module, name), *_), tensor, one, other in zip(owners, tensors, before, storages_of(tensors), strict=True):
        if module._parameters.get(name) is tensor and one is not None and one != other:
            raise BackwardError(
                f"block {block!r}: parameter {name!r} of {type(module).__name__} was given other values "
                "(.data = ...) between forward and backward, so its branch cannot be recomputed as it ran. Do so "
                "after backward"
            )


def refuse_lost(
    step: StepSpec, parameters: Sequence[tuple[Sequence[Owner], bool]], ends: Sequence[Node], leaves: Sequence[Any]
) -> None:
    """Raise where the branch whose graph has these ``ends`` computed with a leaf that is not among ``leaves`` (M15).

    Args:
        step: the step.
        parameters: the owners of each parameter, and whether it came out without a gradient.
        ends: the nodes of the values of the recomputed branch.
        leaves: what the branch was differentiated by.
    """
    known = {id(leaf) for leaf in leaves}
    others = [leaf for leaf in _leaves_of(ends) if id(leaf) not in known]
    if not others:
        return
    sizes = ", ".join(sorted({str(tuple(leaf.shape)) for leaf in others}))
    without = [f"{type(owners[0][0]).__name__}.{owners[0][1]}" for owners, lost in parameters if lost]
    got_none = f", and {', '.join(map(repr, without))} would get none" if without else ""
    raise BackwardError(
        f"block {step.name!r}: its branch computed with tensors (of shape {sizes}) that need a gradient and that its "
        f"modules do not hold as parameters before and after they run. Their gradients would be lost{got_none}. FSDP1 "
        "(FullyShardedDataParallel) and hooks swap parameters in this way: shard with fully_shard (FSDP2), register "
        f"the tensors as parameters, keep the block as it is with exclude={step.name!r}, or use reversible=False"
    )


def _leaves_of(ends: Sequence[Node]) -> Iterator[Tensor]:
    """The leaves that a graph ends in."""
    ahead: list[Any] = list(ends)
    seen: set[Any] = {None}
    while ahead:
        node = ahead.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        ahead += [before for before, _ in node.next_functions]


def without_graph(step: StepSpec, out: Any) -> Any:
    """A branch's value without its gradient graph."""
    if isinstance(out, Tensor):
        return out.detach()
    refuse_containers(step, [out], "hands out")
    return out


def refuse_containers(step: StepSpec, values: list[Any], what: str) -> None:
    """Autograd sees tensors only: those inside anything else would lose their gradient unseen."""
    for value in values:
        leaves = pytree.tree_leaves(value) if isinstance(value, (tuple, list, dict)) else ()
        if any(isinstance(leaf, Tensor) for leaf in leaves):
            raise BackwardError(
                f"block {step.name!r}: its branch {what} tensors inside a {type(value).__name__}, and their gradients "
                f"would be lost. Pass them on one by one, or keep the block as it is with exclude={step.name!r}"
            )
