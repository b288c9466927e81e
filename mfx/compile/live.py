"""Live: compiled chains by the gammas that their model has now.

What is compiled are branches and what lies between chains; gammas are none of that.  So another gamma compiles nothing
anew: a chain is asked for its rules when it runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol
from weakref import WeakSet

from torch import nn

from mfx.options import Options
from mfx.pipeline import Passed, Place
from mfx.plan import with_options
from mfx.rewrite import chains_with_rules
from mfx.run import ChainSpec
from mfx.torch_versions import dynamo


class Traceable(Protocol):
    """What compiling needs to know of a momentumized model.

    ``token`` is a text of its own for each model and each change of its options but for gamma: compiled code is used
    only for the one it was made for.  ``stamp`` names the blocks whose gamma is not 0; ``places`` are
    those of the first plan, ``compiled`` the chains that were compiled.  ``linked``: it is a part that others go on
    from, or it from them, as the model's own Python runs them.
    """

    options: Options
    token: str
    stamp: str
    place: Place
    places: dict[str, tuple[str, ...]]
    compiled: WeakSet[Live]

    @property
    def linked(self) -> bool: ...

    def expected(self) -> tuple[tuple[str, ...], ...] | None:
        """The names of each chain's blocks, where they are known."""
        ...

    def added(self, root: nn.Module) -> dict[str, list[nn.Module]]:
        """The modules that give velocities and gammas, by what they give, one for each chain."""
        ...


def only_for_these_options(source: Any) -> None:
    """Let what is being compiled hold for the options of now alone; ``source`` is Dynamo's name of their owner.

    Where a compiler follows chains into their arithmetic, gamma is a constant there.
    """
    known = dynamo()
    known.install_guard(known.AttrSource(source, "options").make_guard(known.GuardBuilder.ID_MATCH))


_serial = count()


def new_token() -> str:
    """A text that no other model or change of options has."""
    return f"momentum {next(_serial)}"


@dataclass(eq=False)
class Live:
    """The chains of one call of ``owner`` in what was compiled, by the ``options`` that were asked for last."""

    owner: Traceable
    options: Options
    passed: Passed | None = None
    chains: tuple[ChainSpec, ...] = ()

    def take(self, passed: Passed) -> None:
        """Begin with the chains of ``passed``."""
        self.passed, self.chains = passed, passed.rewritten.chains

    def __call__(self, chain: ChainSpec) -> ChainSpec:
        """The chain as it is to run now."""
        if self.options is not self.owner.options:
            assert self.passed is not None
            self.options = self.owner.options
            self.chains = chains_with_rules(self.chains, with_options(self.passed.plan, self.options))
        return self.chains[chain.index]
