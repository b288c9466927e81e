"""Workspaces: the bytes that a convolution on the CPU needs for itself while it runs, beside its operands and results.

1. oneDNN copies operands to a layout of its own, and results back.  Forward: x, w and y are there twice at first, then
   y alone.  Backward computes the gradient of x (copies of that of y, of w, and its result), then that of w (copies
   of x, of the gradient of y, and its result).  Tensors in channels-last order are taken as they are, but for w, whose
   gradient is made in blocks of as many channels as a register has numbers: of a convolution channel by channel,
   blocks that are all but empty.  A gradient of y in another order than x is copied first.
2. The plain kernel unfolds x into columns, forward and for the gradient of w.

Which kernel runs is asked of torch.  The copies are those that the allocator shows for torch 2.14 on x86_64.

Source: aten/src/ATen/native/mkldnn/Conv.cpp, aten/src/ATen/native/ConvolutionMM2d.cpp.
Known limits: on accelerators workspaces are chosen by what is free and faster, and count as nothing here; copies differ
where oneDNN pads channels, and for other operations than convolutions nothing is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mfx.torch_versions import convolution_kernel

_CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


def workspace(func: Any, args: Sequence[Any], result: Any) -> int:
    """The most bytes that an operation has alive beside its operands and ``result``, as far as is known."""
    if func not in _CONVOLUTIONS:
        return 0
    backward = func is _CONVOLUTIONS[1]
    _, x, w, *rest = args if backward else (None, *args)
    if x.device.type != "cpu" or x.dim() != 4:
        return 0
    stride, padding, dilation, transposed, output_padding, groups = rest[1:7]
    kernel = convolution_kernel(x, w, stride, padding, dilation, transposed, output_padding, groups)
    if kernel.startswith("Slow"):
        as_columns = math.prod(w.shape[2:]) == 1 and set(stride) == {1} and set(padding) == {0}
        y = args[0] if backward else result
        columns = x.shape[0] * math.prod(w.shape[1:]) * groups * math.prod(y.shape[2:]) * x.itemsize
        return 0 if as_columns or (backward and not args[10][1]) else columns
    if not kernel.startswith("Mkldnn"):
        return 0
    as_it_is = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    if not backward:
        return _bytes(w) if as_it_is else max(_bytes(x) + _bytes(w), _bytes(result))
    y, wanted = args[0], args[10]
    order = torch.channels_last if as_it_is else torch.contiguous_format
    reordered = 0 if y.is_contiguous(memory_format=order) else _bytes(y)
    strided = any(step != 1 for step in stride)
    of_x, of_w = _channels_last(x, w, groups) if as_it_is else _channels_first(y, x, w, groups > 1, strided)
    given_x, given_w = _bytes(x) if wanted[0] else 0, _bytes(w) if wanted[1] else 0
    most = max(of_x if wanted[0] else 0, given_x + of_w if wanted[1] else 0)
    return reordered + max(most - given_x - given_w, 0)


def _channels_first(y: Tensor, x: Tensor, w: Tensor, grouped: bool, strided: bool) -> tuple[int, int]:
    """Bytes for the gradients of x and of w, these included, where all is copied."""
    of_y, of_x, of_w = map(_bytes, (y, x, w))
    return max(of_y + of_w + of_x, (3 if strided else 2) * of_x), max(0 if grouped else of_x + of_y + of_w, 2 * of_w)


def _channels_last(x: Tensor, w: Tensor, groups: int) -> tuple[int, int]:
    """Bytes for the gradients of x and of w, these included, where x and y are taken as they are."""
    blocks, of_w = _in_blocks(w, groups), _bytes(w)
    copy = 0 if w.is_contiguous(memory_format=torch.channels_last) else of_w
    return _bytes(x) + (of_w if groups > 1 else blocks) + copy, blocks + 2 * of_w + copy


def _in_blocks(w: Tensor, groups: int) -> int:
    """Bytes of w with its channels of each group filled up to whole registers."""
    register = 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
    outputs, inputs = (-(-channels // register) * register for channels in (w.shape[0] // groups, w.shape[1]))
    return groups * outputs * inputs * math.prod(w.shape[2:]) * w.element_size()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
