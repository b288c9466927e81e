"""Verified: the value that a verification gives, its verdicts, and how it looks as text and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from tabulate import tabulate

from mfx.errors import MfxError
from mfx.memory import format_bytes

NOISE = 1 << 16
BLOCK = 1 << 13
LEAK = 1 << 14
"""Bytes that a sound run may have alive beyond what was predicted, in all and for each block, and leave behind: nodes
of autograd, a state of the random generator for each branch that draws (5 KB), freed blocks that are kept."""

_NOT = "NOT OK"
_ONE = 10
"""How much more than ``tolerance`` one gradient may differ, where that of all together is kept."""
_SHOWN = 4


@dataclass(frozen=True)
class ChainVerification:
    """One chain of a :class:`Verification`.

    ``gradient_error`` is relative in the L2 norm over the parameters of the chain's blocks, ``reconstruction`` the
    relative error of x_0, x_1, ... as the backward reconstructs them, ``drift`` what the drift detector measured
    (None: nothing could be checked), ``bound`` what the error model predicts, ``schedule`` the plan in words.
    """

    name: str
    blocks: tuple[str, ...]
    gradient_error: float
    reconstruction: tuple[float, ...]
    drift: float | None
    bound: float
    schedule: str


@dataclass(frozen=True)
class Verification:
    """What a verification found; ``str()`` is a table, and ``ok`` the three verdicts together.

    Errors are relative in the L2 norm.  A tensor that only one of two runs gave, such as a lost gradient, stands in
    ``unmatched`` or ``original_unmatched``, by name, with whose it is.

    *Reversible against stored*: ``output_error`` over all outputs, ``gradient_error`` over all gradients,
    ``gradient_errors`` for each parameter name (and ``input 0`` ...), ``reconstruction_error`` the largest over
    the chains' states.  ``worst`` names the largest gradient error among parameters whose gradient is not negligible
    (a bias before a BatchNorm has none but rounding noise).  ``chains`` has a :class:`ChainVerification` for each.

    *At gamma = 0 against the original*: the same with ``original_`` before it, ``original_buffer_error`` the largest
    over the buffers after the step; ``original_gradient_errors`` are relative to the gradient's own norm, or to a
    thousandth of that of all gradients where it is smaller.  ``original_draws_same`` says whether the random generators
    end in the same state; ``original_tolerance`` is what outputs and buffers may differ by.

    *Memory*: ``saved_bytes`` are kept for backward by the reversible run, ``saved_bytes_stored`` by the stored one,
    counted by hooks; ``predicted_bytes`` are those of the reversible run and its outputs.  By the allocator,
    ``allocated_bytes`` and ``allocated_bytes_stored`` are alive after the forward, and ``leaked_bytes`` are what each
    step leaves behind (None where the allocator cannot be asked).  ``time_ratio`` is the reversible run's time for
    forward and backward over the stored one's.  Bytes and time are the least of a few steps.
    """

    model: str
    output_error: float
    gradient_error: float
    gradient_errors: dict[str, float]
    unmatched: dict[str, str]
    reconstruction_error: float
    saved_bytes: int
    saved_bytes_stored: int
    predicted_bytes: int
    tolerance: float
    worst: str
    time_ratio: float
    chains: tuple[ChainVerification, ...]
    original_output_error: float
    original_gradient_error: float
    original_gradient_errors: dict[str, float]
    original_buffer_error: float
    original_draws_same: bool
    original_unmatched: dict[str, str]
    original_tolerance: float
    allocated_bytes: int | None
    allocated_bytes_stored: int | None
    leaked_bytes: int | None

    @property
    def original_verdict(self) -> str:
        """Whether the momentumized model at gamma = 0 is the original: ``"ok"``, or what differs."""
        allowed, errors = self.original_tolerance, self.original_gradient_errors
        wrong = _beyond("outputs", self.original_output_error, allowed)
        wrong += _beyond("buffers", self.original_buffer_error, allowed)
        off = sorted((name for name in errors if not errors[name] <= _ONE * self.tolerance), key=errors.__getitem__)
        which = f"gradients of {_listed(off[::-1])}" if off else "gradients"
        wrong += _beyond(which, self.original_gradient_error, 0.0 if off else self.tolerance)
        wrong += [] if self.original_draws_same else ["the random generators end in another state"]
        return _verdict(wrong + _alone(self.original_unmatched))

    @property
    def reversible_verdict(self) -> str:
        """Whether the reversible run agrees with the stored one: ``"ok"``, or what differs."""
        wrong = _beyond("outputs", self.output_error, self.tolerance)
        wrong += _beyond("gradients", self.gradient_error, self.tolerance)
        return _verdict(wrong + _alone(self.unmatched))

    @property
    def memory_verdict(self) -> str:
        """Whether the allocator has what was predicted, and gets all of it back: ``"ok"``, or by how much it is off."""
        if self.allocated_bytes is None or self.leaked_bytes is None:
            return "not measured"
        wrong, excess = [], self.allocated_bytes - self.predicted_bytes
        if excess > self.allowance:
            wrong.append(f"after forward {format_bytes(excess)} more are alive than predicted")
        if self.leaked_bytes > LEAK:
            wrong.append(f"each step leaves {format_bytes(self.leaked_bytes)} behind")
        return _verdict(wrong)

    @property
    def allowance(self) -> int:
        """How many bytes more than predicted may be alive: a share, the generator's state for each block, noise."""
        blocks = sum(len(chain.blocks) for chain in self.chains)
        return self.predicted_bytes // 10 + blocks * BLOCK + NOISE

    @property
    def ok(self) -> bool:
        """Whether no verdict is against it."""
        verdicts = (self.original_verdict, self.reversible_verdict, self.memory_verdict)
        return not any(verdict.startswith(_NOT) for verdict in verdicts)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the reconstruction error of each chain by depth, on a logarithmic scale, into a file.

        Args:
            path: where to, with a suffix that matplotlib knows (.png, .svg, .pdf).

        Raises:
            MfxError: matplotlib is not installed (the extra ``mfx[plot]`` brings it).
        """
        try:
            from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise MfxError("Verification.plot needs matplotlib: pip install 'mfx[plot]'") from error
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        for chain in self.chains:
            axes.plot(range(len(chain.reconstruction)), chain.reconstruction, marker=".", label=chain.name)
        axes.axhline(self.tolerance, color="gray", linestyle="--", label="tolerance")
        axes.set_yscale("symlog", linthresh=1e-17)
        axes.set(xlabel="depth", ylabel="relative error of the reconstructed x", title=self.model)
        axes.legend()
        figure.savefig(path)

    def to_dict(self) -> dict[str, Any]:
        """The verification as values that JSON can hold."""
        verdicts = ("original_verdict", "reversible_verdict", "memory_verdict", "ok")
        return {**asdict(self), **{name: getattr(self, name) for name in verdicts}}

    def __str__(self) -> str:
        share = self.saved_bytes / self.saved_bytes_stored if self.saved_bytes_stored else 1.0
        rows = [
            ("against the original at gamma = 0", self.original_verdict),
            ("  output error", f"{self.original_output_error:.1e}"),
            ("  gradient error", f"{self.original_gradient_error:.1e}"),
            ("  buffer error", f"{self.original_buffer_error:.1e}"),
            ("reversible against stored", self.reversible_verdict),
            ("  output error", f"{self.output_error:.1e}"),
            ("  gradient error", f"{self.gradient_error:.1e}"),
            (f"  worst gradient: {self.worst}", f"{self.gradient_errors.get(self.worst, 0.0):.1e}"),
            ("  reconstruction error", f"{self.reconstruction_error:.1e}"),
            *((f"  {chain.name}: gradient error, drift", _chain_cells(chain)) for chain in self.chains),
            ("  time, reversible / stored", f"{self.time_ratio:.2f}"),
            ("memory, by the allocator", self.memory_verdict),
            ("  kept for backward, stored", format_bytes(self.saved_bytes_stored)),
            ("  kept for backward, reversible", f"{format_bytes(self.saved_bytes)} ({share:.0%})"),
            ("  alive after forward, stored", _bytes(self.allocated_bytes_stored)),
            ("  alive after forward, reversible", _bytes(self.allocated_bytes)),
            ("  alive after forward, predicted", _bytes(self.predicted_bytes)),
            ("  left behind by each step", _bytes(self.leaked_bytes)),
            ("tolerance", f"{self.tolerance:.0e}"),
            ("verdict", "ok" if self.ok else "NOT OK"),
        ]
        return tabulate(rows, headers=[self.model, ""], disable_numparse=True)


def _verdict(wrong: list[str]) -> str:
    return f"{_NOT}: {'; '.join(wrong)}" if wrong else "ok"


def _beyond(what: str, error: float, allowed: float) -> list[str]:
    return [] if error <= allowed else [f"{what} differ by {error:.1e}"]


def _alone(unmatched: dict[str, str]) -> list[str]:
    """What only one run gave, by whose it is."""
    owners = dict.fromkeys(unmatched.values())
    names = {owner: [name for name, whose in unmatched.items() if whose == owner] for owner in owners}
    return [f"{_listed(names[owner])}: {owner}" for owner in owners]


def _listed(names: list[str]) -> str:
    """The first few names."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _bytes(size: int | None) -> str:
    return "not measured" if size is None else format_bytes(max(size, 0))


def _chain_cells(chain: ChainVerification) -> str:
    drift = "not checked" if chain.drift is None else f"{chain.drift:.1e}"
    return f"{chain.gradient_error:.1e}, {drift} ({chain.schedule})"
