"""Breaks: whether what Dynamo hands over is all that was compiled.

A chain cut in two would start with a new velocity, and the model would compute another function.

Source: torch/_dynamo/eval_frame.py and convert_frame.py, alike in torch 2.11 and 2.15.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from mfx.errors import CompileError
from mfx.sharding import COMPILE_BLOCKS

_TORCH = os.path.dirname(torch.__file__)
_SHARDING = os.path.join(_TORCH, "distributed", "fsdp")


def refuse_parts(gm: fx.GraphModule) -> None:
    """Raise where ``gm`` is a part only of what the caller compiled.

    Raises:
        CompileError: says where Dynamo broke the graph.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is not None and reason.graph_break:
        where = f"{reason.user_stack[-1].filename}:{reason.user_stack[-1].lineno}" if reason.user_stack else "?"
        text = reason.reason.splitlines()[0]
    else:
        outer = next(_between(), None)
        if outer is None:
            return
        where = f"{outer.f_code.co_filename}:{outer.f_lineno}"
        text = f"{outer.f_code.co_name} runs outside of the graph"
    raise CompileError(
        f"Dynamo breaks the graph at {where} ({text}), and what a momentum chain computes would depend on where it is "
        f"cut: each part starts with a new velocity. {_remedy(where)}"
    )


def _remedy(where: str) -> str:
    if where.startswith(_SHARDING):
        return f'Those are hooks of fully_shard. {COMPILE_BLOCKS}, and leave backend="mfx" out'
    return (
        "Rewrite that line (fullgraph=True shows why it cannot be followed), compile the model alone and not what is "
        "around it, or accept one chain a part with mfx.backend(..., graph_breaks=True)"
    )


def _between() -> Iterator[Any]:
    """The frames outside of torch between the one that Dynamo is at and the compiled function's caller."""
    frame = sys._getframe()
    while frame is not None and not _is(frame, "convert_frame.py", "__call__"):
        frame = frame.f_back
    while frame is not None and not _is(frame, "eval_frame.py", "compile_wrapper"):
        if not frame.f_code.co_filename.startswith(_TORCH):
            yield frame
        frame = frame.f_back


def _is(frame: Any, file: str, name: str) -> bool:
    return frame.f_code.co_name == name and frame.f_code.co_filename.endswith(os.path.join("_dynamo", file))
