"""Streams: several states of a network, in one tensor and apart again.

``parted(joined(layouts, *streams), layouts) == streams``, with ``layouts = [layout(stream) for stream in streams]``.
Joined, streams are updated, undone and kept as one state: each element has its own velocity, so streams have theirs.

Known limits: parts have the order of dimensions in memory that the layouts tell; streams have one dtype and device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mfx.errors import ShapeError

Layout = tuple[tuple[int, ...], tuple[int, ...]]
"""The sizes of a stream, and its dimensions by stride, the largest first."""


def layout(stream: Tensor) -> Layout:
    """The layout of a stream.

    >>> layout(torch.zeros(2, 3, 4).transpose(1, 2))
    ((2, 4, 3), (0, 2, 1))
    """
    order = sorted(range(stream.dim()), key=lambda dim: -stream.stride(dim))
    return tuple(stream.shape), tuple(order)


def joined(layouts: Sequence[Layout], *streams: Tensor) -> Tensor:
    """The streams as one tensor of one dimension.

    Raises:
        ShapeError: a stream has other sizes than its layout, or another dtype than the first one.
    """
    for number, (stream, (sizes, _)) in enumerate(zip(streams, layouts, strict=True)):
        if tuple(stream.shape) != tuple(sizes) or stream.dtype != streams[0].dtype:
            raise ShapeError(
                f"stream {number} of {len(streams)} that read each other is of {stream.dtype} and shape "
                f"{tuple(stream.shape)}, and was to be of {streams[0].dtype} and {tuple(sizes)}. Pass example_inputs= "
                "so that this is known when planning, or keep the blocks as they are with exclude="
            )
    return torch.cat([stream.permute(order).reshape(-1) for stream, (_, order) in zip(streams, layouts, strict=True)])


def parted(state: Tensor, layouts: Sequence[Layout]) -> tuple[Tensor, ...]:
    """The streams of a state, as views of it."""
    inner = [[sizes[dim] for dim in order] for sizes, order in layouts]
    counts = [torch.Size(sizes).numel() for sizes in inner]
    back = [sorted(range(len(order)), key=order.__getitem__) for _, order in layouts]
    parts = zip(state.split(counts), inner, back, strict=True)
    return tuple(part.view(sizes).permute(dims) for part, sizes, dims in parts)
