"""What can go wrong, by name.

Every exception mfx raises is an :class:`MfxError` and every warning an :class:`MfxWarning`; a message
names the argument or the block, what was received, and the remedy.  :class:`Reason` is the one
enumeration of why a rewriting is declined.
"""

from __future__ import annotations

import enum


class MfxError(Exception):
    """Base of every exception raised by mfx."""


class OptionError(MfxError, ValueError):
    """An argument has a value that cannot be used."""


class TooLittleError(OptionError):
    """Less memory is allowed than the least that is possible."""


class InputTypeError(MfxError, TypeError):
    """An argument is of a type that cannot be used."""


class CaptureError(MfxError, RuntimeError):
    """The model's Python could not be followed into one graph."""


class PlanChangedError(MfxError, RuntimeError):
    """A new capture of a momentumized model found other blocks than the first one."""


class EntryError(MfxError, RuntimeError):
    """A momentumized model was entered by a way on which it would be the plain network."""


class ShapeError(MfxError, RuntimeError):
    """A branch returned a value that cannot be added to its skip."""


class BackwardError(MfxError, RuntimeError):
    """A gradient was asked for that the reversible backward cannot give rightly."""


def changed_in_place(what: str, said: object = "") -> BackwardError:
    """The error for ``what`` was changed between forward and backward; ``said`` is autograd's own text."""
    return BackwardError(
        f"{what} was changed in place between forward and backward, so the chain cannot be run backwards as it "
        "ran forwards. Change it after backward, or on a copy (.clone()); with reversible=False activations are "
        "stored" + (f". From autograd: {said}" if said else "")
    )


class CompileError(MfxError, RuntimeError):
    """A compiler was given, or would make, something that the pass cannot turn into the same function."""


class MfxWarning(UserWarning):
    """Base of every warning issued by mfx."""


class NothingRewrittenWarning(MfxWarning):
    """The model has no block that can be rewritten; it comes back as it was."""


class HookWarning(MfxWarning):
    """Forward hooks of modules that the capture entered will not run."""


class StaleGammaWarning(MfxWarning):
    """A copy of a momentumized model has a gamma that the model itself no longer has."""


class CheckpointingWarning(MfxWarning):
    """A model asks for checkpointing of blocks that a chain recomputes anyway."""


class DriftWarning(MfxWarning):
    """A backward did not reconstruct what is known of a chain's state."""


class Reason(enum.Enum):
    """Why a residual add stays as it is, or a chain keeps its activations; the text has room for the node's name."""

    PROJECTION = "the skip path transforms x (through {node})"
    SUBTRACTED_SKIP = "the skip is subtracted, or taken negative: {node}"
    NO_PARAMETERS = "the branch has no parameter"
    BROADCAST = "the branch value at {node} has another shape than x"
    WRITES_SKIP = "the branch writes to x in place at {node}"
    WRITES_INPUT = "{node} writes in place to an input or parameter of the model"
    WRITES_OUTSIDE = "the branch writes in place to a value from outside it at {node}"
    READS_OVERWRITTEN = "{node} reads a value after the block has overwritten it in place"
    OWN_GENERATOR = "{node} draws from a random generator of its own, which a recomputation cannot rewind"
    ORDER = "{node} runs in the middle of the block and cannot be moved before or after it"
    NESTED = "nested in or around {node}, whose chain is kept"
    EXCLUDED = "excluded by the include / exclude patterns"
    NO_GAMMA = "no gamma given"
    KEPT_BEFORE = "kept in the capture that came first"
    STORED_ON_REQUEST = "reversible=False"
    WITHIN_BUDGET = "the activation budget allows it"

    def text(self, node: object = None) -> str:
        """The reason in words, naming ``node``."""
        return self.value.format(node=node)
