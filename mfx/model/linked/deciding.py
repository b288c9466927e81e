"""Deciding: a part whose Python asks whether values are finite, and does something else where they are not.

So do the layers of many transformers in training (``if not torch.isfinite(x).all(): x = torch.clamp(x, ...)``).  The
part is captured as it runs where all is finite, and the graph asks the same questions.  Where one has another answer,
what was drawn is drawn again, and the graph for these answers runs in its place.

Known limits: a part with buffers is not captured in this way, for it might have moved them; hooks run once more.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mfx.capture import Call, named_modules
from mfx.capture.symbolic import SymbolicCapture, capture_symbolic, with_sizes
from mfx.capture.values import Otherwise
from mfx.errors import CaptureError
from mfx.model.state import Entry, Momentum


class Deciding(Momentum):
    """The momentum side of such a part; ``answers`` are those that a call has shown."""

    answers: tuple[bool, ...] = ()

    def call(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        devices = {tensor.device for tensor in Call(args, kwargs).tensors if tensor.device.type not in ("cpu", "meta")}
        generators = [torch, *map(torch.get_device_module, devices)]
        draws = [(place, place.get_rng_state()) for place in generators]
        try:
            while True:
                try:
                    return super().call(root, args, kwargs)
                except Otherwise as other:
                    self.answers = other.answers
                for place, state in draws:
                    place.set_rng_state(state)
        finally:
            self.answers = ()

    def _entry(self, root: nn.Module, call: Call) -> Entry:
        apart = [entry for entry in self.entries if not self._is_asked_for(entry)]
        self.entries = [entry for entry in self.entries if self._is_asked_for(entry)]
        try:
            return super()._entry(root, call)
        finally:
            self.entries = [*apart, *self.entries]

    def _is_asked_for(self, entry: Entry) -> bool:
        return isinstance(entry.captured, SymbolicCapture) and entry.captured.answers == self.answers

    def _by(self, by_symbols: Any, by_dynamo: Any) -> Entry:
        return by_symbols()

    def _symbolic(self, root: nn.Module, call: Call) -> Entry:
        if any(True for _ in root.buffers()):
            raise CaptureError(f"{self.original.__name__} has buffers, and asks whether values are finite")
        captured = capture_symbolic(
            root, self.function, call.form, named_modules(root, self.options, self.place.prefix), answers=self.answers
        )
        captured = with_sizes(captured, root, call) if self.options.shapes else captured
        return Entry(captured, self._passed(root, captured))
