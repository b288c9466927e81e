"""Shapes: what each node of a captured graph gives and keeps, without computing any values.

The graph is interpreted on fake tensors (torch/_subclasses/fake_tensor.py), which know shape, dtype and
device and hold no memory; so inputs of any size cost nothing.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mfx.errors import InputTypeError
from mfx.graph.notes import DTYPE, DTYPE_KEPT, MODES, SHAPE, Modes, calling_whole, switched
from mfx.graph.operations import is_ambient
from mfx.memory import KeptBytes, shape_of
from mfx.sharding import sharded_parameters, unsharded
from mfx.torch_versions import DataDependentOutputException, DynamicOutputShapeException, FakeTensor, FakeTensorMode


class Fake:
    """A place where ``model`` runs on fake inputs; its parameters and buffers stay untouched.

    What FSDP2 shards is whole here.
    """

    def __init__(self, model: nn.Module, tensors: list[Any]) -> None:
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        self.mode: Any = fakes[0].fake_mode if fakes else _fake_mode()
        self.model = model
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.sharded = set(map(id, sharded_parameters(model)))
        self.tensors = [self._fake(tensor) for tensor in tensors]

    def _fake(self, tensor: Any) -> Any:
        if isinstance(tensor, FakeTensor) or not isinstance(tensor, torch.Tensor):
            return tensor
        if tensor.dim() == 0 and tensor.device.type == "cpu" and not tensor.requires_grad:
            # A number that Dynamo made an input, say: code may ask for its value.
            number = tensor.item()
            with self.mode:
                return torch.tensor(number, dtype=tensor.dtype)
        if not tensor.is_meta:
            return self.mode.from_tensor(tensor.detach(), static_shapes=True)
        with self.mode:
            return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=self.device)

    @contextmanager
    def __call__(self) -> Any:
        """Run here: fake parameters and buffers, and a generator that does not move."""
        held: list[tuple[dict[str, Any], str, torch.Tensor]] = [
            (table, name, tensor)
            for module in self.model.modules()
            for table in (module._parameters, module._buffers)
            for name, tensor in table.items()
            if tensor is not None
        ]
        fakes = {id(tensor): self._twin(tensor) for _, _, tensor in held}
        # torch logs what it raises; whoever catches it here says it in words of the model.
        log = logging.getLogger("torch._subclasses.fake_tensor")
        silent, log.disabled = log.disabled, True
        try:
            for table, name, tensor in held:
                table[name] = fakes[id(tensor)]
            with unsharded(self.model), self.mode, torch.random.fork_rng(devices=[]):
                yield
        finally:
            log.disabled = silent
            for table, name, tensor in held:
                table[name] = tensor

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) in self.sharded:
            with self.mode:
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=self.device)
        else:
            fake = self._fake(tensor)
        return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake

    def kept_bytes(self, run: Callable[..., Any]) -> int:
        """Bytes that ``run(model, *tensors)`` would keep for backward."""
        with self(), torch.enable_grad():
            with KeptBytes([*self.model.parameters(), *self.model.buffers(), *_tensors(self.tensors)]) as kept:
                output = run(self.model, *self.tensors)
            total = kept.total()
            del output
        return total


def _fake_mode() -> Any:
    """Shapes are numbers here, but for the ragged sizes of jagged tensors: these are symbols of an environment."""
    symbols = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
    return FakeTensorMode(allow_non_fake_inputs=True, shape_env=symbols)


def asking(given: Any, twin: Any) -> Any:
    """``twin``, asking for a gradient as ``given`` does; no leaf where that is none, since none may be written to."""
    if not isinstance(given, torch.Tensor) or not given.requires_grad:
        return twin
    with torch.enable_grad():
        return twin.requires_grad_() if given.is_leaf else twin.requires_grad_().clone()


class Real(Fake):
    """The place where a model runs on real values: on copies, which are all that it writes to."""

    def __init__(self, model: nn.Module, tensors: list[Any]) -> None:
        self.mode = contextlib.nullcontext()
        self.model = model
        self.given = tensors
        self.sharded = set()

    def _fake(self, tensor: Any) -> Any:
        return asking(tensor, tensor.detach().clone()) if isinstance(tensor, torch.Tensor) else tensor

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        self.tensors = [self._fake(value) for value in self.given]
        devices = {parameter.device for parameter in self.model.parameters() if parameter.device.type != "cpu"}
        kind = next(iter(devices)).type if devices else "cuda"
        with torch.random.fork_rng([device.index or 0 for device in devices], device_type=kind), super().__call__():
            yield


class Interpreter(fx.Interpreter):
    """Runs a root-relative graph node by node, each under its modes; ``at`` is the node that runs."""

    def __init__(self, graph: fx.Graph, root: nn.Module) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.root = root
        self.base: Modes | None = graph.output_node().meta.get(MODES)
        self.now = self.base
        self.switch = contextlib.ExitStack()
        self.at: fx.Node | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        with self.switch:
            return super().run(*args, **kwargs)

    def fetch_attr(self, target: str) -> Any:
        owner, _, name = target.rpartition(".")
        return getattr(self.root.get_submodule(owner), name)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Lists are made anew, as the graph's code makes them: a wrapped helper may write to its own."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_anew, args)), {name: _anew(value) for name, value in kwargs.items()}

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with calling_whole():
            return self.root.get_submodule(target)(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        self.at = n
        modes = n.meta.get(MODES)
        if self.base is not None and is_ambient(n):
            return None
        if self.base is not None and modes is not None and modes != self.now and n.op not in _ANYWHERE:
            self.switch.close()
            if modes != self.base:
                self.switch.enter_context(switched(*modes.switch(self.base)))
            self.now = modes
        return super().run_node(n)


def _anew(value: Any) -> Any:
    """``value`` with lists and dicts of its own, where fx's cannot be written to."""
    if isinstance(value, dict):
        return {key: _anew(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_anew(each) for each in value]
    return tuple(map(_anew, value)) if type(value) is tuple else value


_ANYWHERE = ("placeholder", "get_attr")
"""What may be done under any modes."""


class _Noting(Interpreter):
    """Notes each value's shape and dtype, and the bytes that it keeps."""

    def __init__(self, graph: fx.Graph, root: nn.Module, kept: KeptBytes) -> None:
        super().__init__(graph, root)
        self.kept = kept

    def run_node(self, n: fx.Node) -> Any:
        self.kept.owner = n
        value = super().run_node(n)
        if isinstance(value, torch.Tensor):
            n.meta[SHAPE], n.meta[DTYPE] = tuple(shape_of(value)), value.dtype
            if n.op == "call_method" and n.target == "to":
                source = self.env.get(n.all_input_nodes[0]) if n.all_input_nodes else None
                n.meta[DTYPE_KEPT] = isinstance(source, torch.Tensor) and source.dtype == value.dtype
        return value


def _tensors(values: list[Any]) -> list[torch.Tensor]:
    return [value for value in values if isinstance(value, torch.Tensor)]


def propagate_shapes(graph: fx.Graph, root: nn.Module, tensors: list[Any]) -> dict[fx.Node, int]:
    """Note shape and dtype of every node's value in its meta; gives the bytes each keeps for backward.

    A model whose shapes depend on values is interpreted as far as that goes.

    Raises:
        InputTypeError: the inputs do not fit the model.
    """
    fake = Fake(root, tensors)
    with fake(), torch.enable_grad():
        output = None
        with KeptBytes([*root.parameters(), *root.buffers(), *_tensors(fake.tensors)]) as kept:
            try:
                output = _Noting(graph, root, kept).run(*fake.tensors)
            except (DataDependentOutputException, DynamicOutputShapeException):
                return {}
            except (RuntimeError, TypeError, ValueError) as error:
                shapes = ", ".join(f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in _tensors(tensors))
                raise InputTypeError(
                    f"example_inputs do not fit the model (received {shapes}): {str(error).splitlines()[0]}"
                ) from error
        sizes = {node: size for node, size in kept.by_owner().items() if isinstance(node, fx.Node)}
        del output
    return sizes
