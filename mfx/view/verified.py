"""Verified: the value that a verification gives, and how it looks as text and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from tabulate import tabulate

from mfx.errors import MfxError
from mfx.memory import format_bytes


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
    """How the reversible run compares with the stored one; ``str()`` is a table.

    Errors are relative in the L2 norm: ``output_error`` over all outputs, ``gradient_error`` over all gradients,
    ``gradient_errors`` for each parameter name (and ``input 0`` ...), ``reconstruction_error`` the largest over
    the chains' states.  ``saved_bytes`` are kept for backward by the reversible run, ``saved_bytes_stored`` by
    the stored one; ``time_ratio`` is the reversible run's time for forward and backward over the stored one's, the
    best of a few.  ``worst`` names the largest gradient error among parameters whose gradient is not negligible
    (a bias before a BatchNorm has none but rounding noise).  ``chains`` has a :class:`ChainVerification` for each.
    """

    model: str
    output_error: float
    gradient_error: float
    gradient_errors: dict[str, float]
    reconstruction_error: float
    saved_bytes: int
    saved_bytes_stored: int
    tolerance: float
    worst: str
    time_ratio: float
    chains: tuple[ChainVerification, ...]

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

    @property
    def ok(self) -> bool:
        """Whether outputs and gradients agree within ``tolerance``."""
        return self.output_error <= self.tolerance and self.gradient_error <= self.tolerance

    def to_dict(self) -> dict[str, Any]:
        """The verification as values that JSON can hold."""
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        share = self.saved_bytes / self.saved_bytes_stored if self.saved_bytes_stored else 1.0
        rows = [
            ("output error", f"{self.output_error:.1e}"),
            ("gradient error", f"{self.gradient_error:.1e}"),
            (f"worst gradient: {self.worst}", f"{self.gradient_errors.get(self.worst, 0.0):.1e}"),
            ("reconstruction error", f"{self.reconstruction_error:.1e}"),
            *((f"{chain.name}: gradient error, drift", _chain_cells(chain)) for chain in self.chains),
            ("kept for backward, stored", format_bytes(self.saved_bytes_stored)),
            ("kept for backward, reversible", f"{format_bytes(self.saved_bytes)} ({share:.0%})"),
            ("time, reversible / stored", f"{self.time_ratio:.2f}"),
            ("tolerance", f"{self.tolerance:.0e}"),
            ("verdict", "ok" if self.ok else "NOT OK"),
        ]
        return tabulate(rows, headers=[self.model, "reversible against stored"], disable_numparse=True)


def _chain_cells(chain: ChainVerification) -> str:
    drift = "not checked" if chain.drift is None else f"{chain.drift:.1e}"
    return f"{chain.gradient_error:.1e}, {drift} ({chain.schedule})"
