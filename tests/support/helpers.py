"""Run a model and compare runs: outputs, gradients, buffers and the random generator, all at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mfx

Named = dict[str, "Tensor | None"]

_SMALL = 1e-3
"""A tensor that is this much smaller than its group is compared on the scale of the group (rounding noise)."""


@dataclass(frozen=True)
class Result:
    """Everything one forward and backward gives.

    ``outputs`` by place in the output tree; ``input_grads`` by place among the inputs; ``grads`` and ``buffers``
    by name; ``generator_state`` of the CPU generator after the forward.  A gradient that is None stays None.
    """

    outputs: Named
    input_grads: Named
    grads: Named
    buffers: Named
    generator_state: Tensor


def run(model: nn.Module, *inputs: Any, seed: int = 0, **kwargs: Any) -> Result:
    """One forward of ``model(*inputs, **kwargs)`` and one backward from fixed random cotangents.

    The generator is seeded before the forward.  Inputs may be nested; tensors are copied, and get a gradient
    where they ask for one.  The model is left as it was: its buffers are put back and its gradients cleared.
    """
    args, named = pytree.tree_map_only(torch.Tensor, _fresh, (inputs, kwargs))
    _clear(model)
    with buffers_kept(model):
        torch.manual_seed(seed)
        outputs = _named(model(*args, **named))
        generator_state = torch.get_rng_state()
        backward(outputs, seed)
        values = {name: tensor.detach().clone() for name, tensor in outputs.items() if tensor is not None}
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        given = {name: tensor for name, tensor in _named((args, named)).items() if tensor is not None}
        input_grads = {name: tensor.grad for name, tensor in given.items() if tensor.requires_grad}
        buffers: Named = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    _clear(model)
    return Result(values, input_grads, grads, buffers, generator_state)


def backward(outputs: Any, seed: int = 0, **kwargs: Any) -> None:
    """Backward from every differentiable tensor of an output tree, with cotangents that ``seed`` fixes."""
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for tensor in _named(outputs).values():
        if tensor is not None and tensor.is_floating_point():
            cotangent = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor)
            pairs += [(tensor, cotangent)] if tensor.requires_grad else []
    if pairs:
        tensors, cotangents = zip(*pairs, strict=True)
        torch.autograd.backward(tensors, cotangents, **kwargs)


def relative_error(a: Any, b: Any) -> float:
    """The L2 norm of ``a - b`` over that of ``b``, over all tensors of two like trees (None counts as zero)."""
    ours, theirs = _named(a), _named(b)
    assert ours.keys() == theirs.keys(), f"different trees: {sorted(ours.keys() ^ theirs.keys())}"
    difference = sum(_distance(ours[name], theirs[name]) ** 2 for name in theirs) ** 0.5
    return _ratio(difference, sum(_norm(value) ** 2 for value in theirs.values()) ** 0.5)


def assert_same(one: Result, other: Result, tolerance: float = 1e-10) -> None:
    """Compare all of two results, tensor by tensor; ``other`` is the reference.

    Each tensor's error is relative to its own L2 norm.  Names, shapes, dtypes and which gradients are None must
    be equal; so must whole numbers and the generator's state, exactly.
    """
    for group in ("outputs", "buffers", "input_grads", "grads"):
        _assert_same_group(group, getattr(one, group), getattr(other, group), tolerance)
    assert torch.equal(one.generator_state, other.generator_state), "the random generator ends in another state"


def chain_names(mm: nn.Module) -> tuple[tuple[str, ...], ...]:
    """The names of the blocks of each chain of a momentumized model, as its latest graphs have them."""
    return tuple(chain.blocks for chain in mfx.chains(mm))


def kept_bytes(model: nn.Module, *inputs: Any, seed: int = 0, **kwargs: Any) -> int:
    """The bytes of the distinct storages that autograd keeps for the backward of one forward.

    Storages of parameters, buffers and inputs are there anyway and do not count.
    """
    args, named = pytree.tree_map_only(torch.Tensor, _fresh, (inputs, kwargs))
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept.setdefault(storage.data_ptr(), storage)
        return tensor

    with buffers_kept(model):
        torch.manual_seed(seed)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            outputs = model(*args, **named)
    given = [*model.parameters(), *model.buffers(), *_named((args, named)).values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in given}
    del outputs
    return sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in known)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put the model's buffers back afterwards."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.detach().copy_(value)


def _fresh(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _clear(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def _named(tree: Any) -> dict[str, Any]:
    """The tensors (and Nones) of a tree by their place in it."""
    leaves = pytree.tree_flatten_with_path(tree)[0]
    tensors = [(path, leaf) for path, leaf in leaves if leaf is None or isinstance(leaf, torch.Tensor)]
    return {pytree.keystr(path): leaf for path, leaf in tensors}


def _assert_same_group(group: str, ours: Named, theirs: Named, tolerance: float) -> None:
    assert ours.keys() == theirs.keys(), f"{group}: {sorted(ours.keys() ^ theirs.keys())} on one side only"
    whole = sum(_norm(value) ** 2 for value in theirs.values()) ** 0.5
    for name, expected in theirs.items():
        found = ours[name]
        if expected is None or found is None:
            assert found is expected, f"{group} {name}: {_kind(found)}, expected {_kind(expected)}"
            continue
        assert _kind(found) == _kind(expected), f"{group} {name}: {_kind(found)}, expected {_kind(expected)}"
        scale = max(_norm(expected), _SMALL * whole)
        error = _ratio(_distance(found, expected), scale)
        allowed = tolerance if expected.is_floating_point() else 0.0
        assert error <= allowed, f"{group} {name}: relative error {error:.2e}, allowed {allowed:.0e}"


def _kind(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    """The L2 norm of the difference; equal infinities and NaN in the same place differ by nothing."""
    if a is None or b is None:
        return _norm(b if a is None else a)
    one, other = a.detach().double(), b.detach().double()
    same = (one == other) | (one.isnan() & other.isnan())
    return torch.where(same, 0.0, one - other).norm().item()


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else tensor.detach().double().nan_to_num(0.0, 0.0, 0.0).norm().item()


def _ratio(difference: float, scale: float) -> float:
    if difference == 0:
        return 0.0
    return difference / scale if scale else float("inf")
