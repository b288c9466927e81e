"""Checkpointing: switches of models that checkpoint their own blocks, off while momentum runs them.

A block that its model wraps into ``torch.utils.checkpoint`` is hidden from a capture, and a chain recomputes its
branches anyway.  So inside a captured part the switches that Hugging Face (``gradient_checkpointing``) and timm
(``grad_checkpointing``) set are off for the time of a call; outside of it they act as they did.

Known limits: a model that calls ``torch.utils.checkpoint`` without such a switch is captured as it is, its blocks kept.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

from torch import nn

from mfx.errors import CheckpointingWarning

_SWITCHES = ("gradient_checkpointing", "grad_checkpointing")
_told: set[tuple[str, str]] = set()


@contextlib.contextmanager
def switched_off(root: nn.Module) -> Iterator[None]:
    """Switch the model's own checkpointing off inside ``root``; says so once for each class that has such a switch."""
    on = [(module, name) for module in root.modules() for name in _SWITCHES if module.__dict__.get(name) is True]
    kinds = {(type(module).__module__, type(module).__qualname__) for module, _ in on}
    if not kinds <= _told:
        _told.update(kinds)
        warnings.warn(
            f"{type(root).__name__} asks for gradient checkpointing of its blocks, which momentum chains recompute "
            "anyway: inside of them it is ignored",
            CheckpointingWarning,
            stacklevel=2,
        )
    try:
        for module, name in on:
            module.__dict__[name] = False
        yield
    finally:
        for module, name in on:
            module.__dict__[name] = True
