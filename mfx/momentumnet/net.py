"""MomentumNet: a chain whose branches are given as modules, without any capture.

The interface of momentumnet's class of this name over the chain that the pass emits (:mod:`mfx.run`):

1. each function becomes one step; its branch calls the module with x and the extra arguments of the call;
2. the tensors among the extra arguments are side inputs, and get gradients;
3. v_0 is zero, or ``init_function(x)``;
4. under a compiler the plain recurrence is traced and rewritten like any model (:mod:`mfx.compile.inside`).

Reference: Sander et al., ICML 2021, arXiv 2102.07870, equation (5); momentumnet 0.10 for names and meanings.
Known limits: functions must be modules, and return one tensor of x's shape.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from mfx.compile.inside import traced
from mfx.errors import InputTypeError, OptionError
from mfx.graph.draws import module_is_random, module_sees_grad_mode
from mfx.graph.notes import STATE
from mfx.model.inverse import Chain
from mfx.model.parts import refuse_replica
from mfx.momentumnet.functions import (
    Names,
    call_function,
    checked_module,
    listed_functions,
    parameters_of,
    refuse_hidden,
)
from mfx.momentumnet.side import NetSide, names_of
from mfx.options import Options, RuleName, check_rule, make_options
from mfx.rule import Momentum, Rule, StepSpec
from mfx.run import ChainSpec, run
from mfx.torch_versions import pytree


class MomentumNet(nn.Module):
    """A Momentum ResNet from a list of modules.

    With f_i the functions, for i = 0 ... n - 1::

        v <- gamma * v + (1 - gamma) * f_i(x, *args, **kwargs)          is_residual=True
        v <- gamma * v + (1 - gamma) * (f_i(x, *args, **kwargs) - x)    is_residual=False
        x <- x + v

    Args:
        functions: modules (a list, ``nn.Sequential``, ``nn.ModuleList``) that map x, and the extra arguments of the
            call, to a tensor of x's shape.  The same module may be there several times.
        gamma: float in [-1, 1].  At 0 the network is ``x <- x + f(x)``; at 1 the velocity stays what it was.
        init_speed: whether v_0 is ``init_function(x)``; otherwise it is zero.
        init_function: module from x to v_0, for ``init_speed=True``.
        use_backprop: True stores activations (plain backpropagation); False is the reversible run, which does not.
        is_residual: whether the functions are the branches f of ``x + f(x)``, or whole blocks.
        rule, h, state_dtype, tolerance: as for :func:`mfx.momentumize`.

    Returns:
        Of a call: x_n, of the shape and dtype of x (or of the dtype that the functions' values promote it to).

    Raises:
        OptionError: an argument has a value that cannot be used.
        InputTypeError: a function is not a module, or an argument of a call hides tensors that need gradients.
        ShapeError: a function changes the shape of x.

    Example:
        >>> import torch, mfx
        >>> from torch import nn
        >>> function = nn.Sequential(nn.Linear(50, 8), nn.Tanh(), nn.Linear(8, 50))
        >>> net = mfx.MomentumNet([function] * 10, gamma=0.99, use_backprop=False)
        >>> net(torch.randn(10, 50)).shape
        torch.Size([10, 50])

    Parameters are named ``network.<i>.<name>`` and ``network.init.<name>``, as momentumnet names them.

    Source: Sander et al., ICML 2021, arXiv 2102.07870, equation (5).
    """

    def __init__(
        self,
        functions: Iterable[nn.Module],
        gamma: float = 0.9,
        init_speed: bool = False,
        init_function: nn.Module | None = None,
        use_backprop: bool = True,
        is_residual: bool = True,
        *,
        rule: RuleName = "momentum",
        h: float | None = None,
        state_dtype: torch.dtype | str = "auto",
        tolerance: float | None = None,
    ) -> None:
        super().__init__()
        members = {str(index): function for index, function in enumerate(listed_functions(functions))}
        if init_speed and init_function is None:
            raise OptionError("init_speed=True takes v_0 from init_function, which is None: give a module x -> v_0")
        if init_function is not None:
            members["init"] = checked_module(init_function, "init_function")
        self.network = nn.ModuleDict(members)
        self.init_speed = bool(init_speed)
        options = Options(modules=("network.[0-9]*",), only_whole=True, velocity=_learned if init_speed else "zero")
        checked = make_options(state_dtype=state_dtype, tolerance=tolerance)
        named = check_rule(rule, h, gamma, "x")
        options = replace(options, rule=named, state_dtype=checked.state_dtype, tolerance=checked.tolerance)
        self.__dict__[STATE] = NetSide(options, names_of(self.functions))
        self.gamma = gamma
        self.use_backprop = use_backprop
        self.is_residual = is_residual

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x_n from x; the extra arguments are handed to every function."""
        if torch.compiler.is_dynamo_compiling():
            return traced(self, getattr(self, STATE), _in_sequence, (x, *args), kwargs)
        refuse_replica(self)
        leaves, layout = pytree.tree_flatten((args, kwargs))
        refuse_hidden(leaves)
        spec, operands = self._chain(layout, leaves)
        velocity = self._first_velocity(x)
        return run(spec, self, x, velocity, *operands)[0]

    def flow(self, x: Tensor, v: Tensor | None = None, /, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(x_n, v_n) in float64 from x and v_0, with activations stored; v None is the v_0 of a call.

        Example:
            >>> import torch, mfx
            >>> net = mfx.MomentumNet([torch.nn.Linear(3, 3)] * 4, gamma=0.9)
            >>> x = torch.randn(2, 3)
            >>> again, v_0 = net.inverse(*net.flow(x))
            >>> bool((again - x).norm() < 1e-4), bool(v_0.norm() < 1e-4)
            (True, True)
        """
        chain, sides = self._inverse(args, kwargs)
        return chain.forward(x, self._first_velocity(x) if v is None else v, sides)

    def inverse(self, x: Tensor, v: Tensor, /, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """(x_0, v_0) in float64 from (x_n, v_n), as :meth:`flow` gives them; differentiable.

        See :meth:`mfx.Chain.inverse` for its error and its exceptions.
        """
        chain, sides = self._inverse(args, kwargs)
        return chain.inverse(x, v, sides)

    @property
    def functions(self) -> list[nn.Module]:
        """The modules f_0 ... f_(n-1)."""
        return [self.network[name] for name in self.network if name != "init"]

    @property
    def init_function(self) -> nn.Module | None:
        """The module from x to v_0, if one was given."""
        return self.network._modules.get("init")

    @property
    def gamma(self) -> float:
        """The momentum; set it to change it."""
        return self.__dict__[STATE].options.gamma

    @gamma.setter
    def gamma(self, gamma: float) -> None:
        if not isinstance(gamma, Real) or isinstance(gamma, bool):
            raise InputTypeError(f"gamma must be a float in [-1, 1], not {type(gamma).__name__} ({gamma!r})")
        if math.isnan(gamma) or not -1 <= gamma <= 1:
            raise OptionError(f"gamma={gamma!r}: it must be a float in [-1, 1], such as 0.9")
        self.__dict__[STATE].change(gamma=float(gamma))

    @property
    def use_backprop(self) -> bool:
        """Whether activations are stored; set it to change it."""
        return not self.__dict__[STATE].options.reversible

    @use_backprop.setter
    def use_backprop(self, use_backprop: bool) -> None:
        self.__dict__[STATE].change(reversible=not use_backprop)

    @property
    def is_residual(self) -> bool:
        """Whether the functions are branches, not whole blocks; set it to change it."""
        return self.__dict__[STATE].options.kind == "branch"

    @is_residual.setter
    def is_residual(self, is_residual: bool) -> None:
        self.__dict__[STATE].change(kind="branch" if is_residual else "wrapped")

    def __len__(self) -> int:
        return sum(name != "init" for name in self.network)

    def extra_repr(self) -> str:
        """The options, for printing."""
        named = self.__dict__[STATE].options.rule
        rule = f"gamma={self.gamma}" if named is None else f"rule={named!r}"
        return f"{rule}, use_backprop={self.use_backprop}, is_residual={self.is_residual}"

    @property
    def _rule(self) -> Rule:
        """The rule of all steps."""
        return self.__dict__[STATE].options.rule or Momentum(self.gamma)

    def _first_velocity(self, x: Tensor) -> Tensor | None:
        return self.network["init"](x) if self.init_speed else None

    def _chain(self, layout: pytree.TreeSpec, leaves: list[Any]) -> tuple[ChainSpec, list[tuple[Any, ...]]]:
        """The chain for calls of this layout, and what each step takes."""
        names: dict[nn.Module, tuple[Names, tuple[Tensor, ...]]] = {}
        steps, operands = [], []
        for index, function in enumerate(self.functions):
            path = f"network.{index}"
            if function not in names:
                names[function] = parameters_of(path, function)
            parameters, tensors = names[function]
            steps.append(self._step(path, function, layout, len(leaves), parameters))
            operands.append((*leaves, *tensors))
        return self.__dict__[STATE].spec(tuple(steps)), operands

    def _step(self, path: str, function: nn.Module, layout: pytree.TreeSpec, sides: int, parameters: Names) -> StepSpec:
        branch = partial(call_function, path, layout)
        return StepSpec(
            name=path,
            branch=branch,
            again=branch,
            rule=self._rule,
            wrapped=not self.is_residual,
            scale=1.0,
            written="",
            sides=(None,) * sides,
            parameters=parameters,
            modules=(path,),
            buffers=(),
            statistics=(),
            draws=module_is_random(function),
            sees_grad_mode=module_sees_grad_mode(function),
        )

    def _inverse(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Chain, list[list[Any]]]:
        leaves, layout = pytree.tree_flatten((args, kwargs))
        spec, _ = self._chain(layout, leaves)
        return Chain(spec, self), [leaves] * len(spec.steps)


def _learned(chain: object) -> nn.Module:
    """Stands in the options of a net whose velocity is learned; its module is in the net."""
    raise AssertionError(f"{chain} has its velocity from init_function")


def _in_sequence(net: MomentumNet, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """What a compiler traces: the functions one after another, each of which will be a block."""
    for function in net.functions:
        x = function(x, *args, **kwargs)
    return x
