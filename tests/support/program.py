"""Program: a described model as the list of operations that its forward runs, one by one, in order.

Written from the description alone, with the functions of ``torch.nn.functional``; of the built network only the
parameters and buffers are taken, by their names.  :mod:`oracle` finds the blocks among the operations.  Nothing of the
package under test is used here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from strategies import WIDTH, Block, Model, Stage
from torch import Tensor


@dataclass(eq=False)
class Call:
    """One run of the forward of the module at ``path``."""

    path: str


@dataclass(eq=False)
class Op:
    """One operation; the first of its ``inputs`` is what it is applied to.

    ``width`` is the size of its last dimension, ``keeps`` whether it keeps the shape of what it is applied to whatever
    that is.  ``writes`` says that it writes into that, ``passes`` that it is that, ``may_pass`` that it is so in
    evaluation mode.  An add is ``left + scale * right``.
    """

    name: str
    inputs: tuple[Op, ...]
    run: Callable[..., Tensor]
    call: Call
    position: int
    width: int
    keeps: bool = False
    learns: bool = False
    writes: bool = False
    passes: bool = False
    may_pass: bool = False
    scale: float = 0.0
    returned: list[Call] = field(default_factory=list)

    @property
    def adds(self) -> bool:
        return self.scale != 0


class Program:
    """The operations of ``model``.

    Args:
        model: the description.
        tensors: parameters and buffers by name.
        in_training: whether normalization, and whether everything else, is in training mode, when asked.
    """

    def __init__(
        self, model: Model, tensors: Mapping[str, Tensor], in_training: Callable[[], tuple[bool, bool]]
    ) -> None:
        self.tensors = tensors
        self.in_training = in_training
        self.ops: list[Op] = []
        self.handed_out: list[Op] = []
        root = Call("")
        self.inputs = tuple(
            self.op(root, name, (), None, width) for name, width in (("x", WIDTH), ("mask", 1), ("memory", 1))
        )
        x = self.layer(root, "stem", "linear", self.inputs[0])
        for index, stage in enumerate(model.stages):
            x = self.stage(f"stages.{index}", stage, x)
        self.result = self.layer(root, "head", "linear", x, 2)

    def op(self, call: Call, name: str, inputs: tuple[Op, ...], run: Any, width: int = 0, **more: Any) -> Op:
        """Append an operation."""
        self.ops.append(Op(name, inputs, run, call, len(self.ops), width or inputs[0].width, **more))
        return self.ops[-1]

    def stage(self, path: str, stage: Stage, x: Op) -> Op:
        call = Call(path)
        if stage.between in ("wider", "linear"):
            x = self.layer(call, f"{path}.change", "linear", x, x.width + (stage.between == "wider"))
        elif stage.between == "projection block":
            left = self.layer(call, f"{path}.shortcut", "linear", x)
            right = self.layer(call, f"{path}.change", "linear", self.layer(call, "", "tanh", x))
            x = self.layer(call, "", "relu", self.add(call, "x + f", left, right))
        elif stage.between == "broadcast add":
            changed = self.layer(call, f"{path}.change", "linear", x)
            mean = self.op(call, "mean", (changed,), lambda value: value.mean(1, keepdim=True), 1)
            x = self.add(call, "x + f", x, mean)
        start, here, spec = x, "", stage.blocks[0]
        for index, own in enumerate(stage.blocks):
            if not own.again or not here:
                here, spec = f"{path}.blocks.{index}", own
            x = self.block(here, spec, x, start)
        x = self.add(call, "x + f", start, x) if stage.long_skip else x
        x.returned.append(call)
        return x

    def block(self, path: str, spec: Block, x: Op, start: Op) -> Op:
        call = Call(path)
        value = self.op(call, "mul", (x,), lambda x: x * 0.5, keeps=True) if spec.form == "x += f" else x
        for index, name in enumerate(spec.layers):
            value = self.layer(call, f"{path}.layers.{index}", name, value)
        for index, inner in enumerate(spec.inner):
            value = self.block(f"{path}.inner.{index}", inner, value, start)
        if spec.side == "mask":
            value = self.op(call, "masked_fill", (value, self.inputs[1]), lambda a, mask: a.masked_fill(mask, 0.1))
        elif spec.side:
            value = self.op(call, "mul", (value, self.inputs[2] if spec.side == "memory" else start), torch.mul)
        if spec.returned == "branch value":
            self.handed_out.append(value)
        elif spec.returned == "shape":
            self.handed_out.append(self.op(call, "sum", (value,), lambda value: value.sum() / value.shape[0], 1))
        x = self.add(call, spec.form, x, value)
        for index, name in enumerate(spec.tail):
            x = self.layer(call, f"{path}.tail.{index}", name, x)
        x.returned.append(call)
        if spec.tap:
            self.handed_out.append(self.layer(call, f"{path}.head", "linear", x, 2) if spec.tap == "head" else x)
        return x

    def add(self, call: Call, form: str, x: Op, value: Op) -> Op:
        if form == "look through":
            x = self.op(call, "identity", (x,), lambda x: x, passes=True)
            x = self.op(call, "contiguous", (x,), lambda x: x.contiguous(), passes=True)
        if form in ("f + x", "f += x"):
            x, value = value, x
        scale = {"x - f": -1.0, "alpha": 0.5}.get(form, 1.0)
        if form.split()[1:2] == ["+="]:
            return self.op(call, "add", (x, value), Tensor.add_, scale=1.0, writes=True)
        return self.op(call, "add", (x, value), partial(torch.add, alpha=scale), scale=scale)

    def layer(self, call: Call, path: str, name: str, x: Op, width: int = 0) -> Op:
        """The layer of a name, with the parameters and buffers at ``path``."""
        tensors = {key: self.tensors.get(f"{path}.{key}") for key in ("weight", "bias", "mean", "var")}
        weight, bias, mean, var = tensors.values()
        if name.startswith("autocast_"):  # which spares float64
            return self.layer(call, f"{path}.linear", "linear", x)
        if name == "linear":
            return self.op(call, name, (x,), lambda x: F.linear(x, weight, bias), width, learns=True)
        if name == "norm":
            run: Any = lambda x: F.layer_norm(x, x.shape[-1:], weight, bias)  # noqa: E731
        elif name == "batch_norm":
            run = partial(self._batch_norm, path)
        elif name == "functional_batch_norm":
            run = lambda x: F.batch_norm(x, mean, var, weight, training=self.in_training()[0])  # noqa: E731
        elif name.removesuffix("_in_place") in ("dropout", "functional_dropout"):
            in_place = name.endswith("_in_place")
            run = lambda x: F.dropout(x, 0.3, self.in_training()[1], in_place)  # noqa: E731
        else:
            run = _PLAIN[name]
        kind = {"learns": "norm" in name, "writes": name.endswith("_in_place"), "may_pass": "dropout" in name}
        return self.op(call, name, (x,), run, keeps=True, **kind)

    def _batch_norm(self, path: str, x: Tensor) -> Tensor:
        mean, var, count, weight, bias = (
            self.tensors[f"{path}.{key}"]
            for key in ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
        )
        training = self.in_training()[0]
        if training:
            count.add_(1)
        return F.batch_norm(x, mean, var, weight, bias, training)


_PLAIN = {
    "relu": F.relu,
    "relu_in_place": F.relu_,
    "tanh": torch.tanh,
    "tanh_in_place": torch.tanh_,
    "rounded": lambda x: x + ((4 * x).round() / 4 - x).detach(),
    "gate": lambda x: x * torch.sigmoid(x.detach()),
}
