"""From a model and a call to a graph with its notes, and to the calls that the graph stands for."""

from mfx.capture.call import Call, Captured, as_call, default_form
from mfx.capture.dynamo import capture_dynamo
from mfx.capture.named import named_modules
from mfx.capture.proof import prove
from mfx.capture.symbolic import capture_symbolic

__all__ = [
    "Call",
    "Captured",
    "as_call",
    "capture_dynamo",
    "capture_symbolic",
    "default_form",
    "named_modules",
    "prove",
]
