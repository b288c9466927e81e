"""A UNet with the structure of diffusers' ``UNet2DConditionModel``: of its size and depth, written anew.

Four levels of two residual blocks, each followed by a transformer block that also attends to a text; a middle; four
levels back of three, each taking the value of the level on the way down by concatenation; a time embedding that every
residual block adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ResBlock(nn.Module):
    """Two convolutions with the time embedding between; the skip is projected where channels change."""

    def __init__(self, before: int, after: int, time: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, before), nn.GroupNorm(8, after)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.time = nn.Linear(time, after)
        self.shortcut = nn.Identity() if before == after else nn.Conv2d(before, after, 1)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(nn.functional.silu(self.norm1(x)))
        h = h + self.time(nn.functional.silu(time))[:, :, None, None]
        return self.shortcut(x) + self.conv2(nn.functional.silu(self.norm2(h)))


class Attention(nn.Module):
    """Attention to itself, or to ``context``."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(context, width), nn.Linear(context, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = (
            part(given).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part, given in ((self.q, x), (self.k, context), (self.v, context))
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention and a gated feed-forward part, three residual adds."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.own, self.cross = Attention(width, width, heads), Attention(width, context, heads)
        self.gate, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.own(self.norm1(x))
        x = x + self.cross(self.norm2(x), context)
        value, gate = self.gate(self.norm3(x)).chunk(2, dim=-1)
        return x + self.down(value * nn.functional.gelu(gate))


class SpatialTransformer(nn.Module):
    """Pixels as tokens through transformer blocks, with a residual add around them."""

    def __init__(self, width: int, context: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.enter, self.leave = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.blocks = nn.ModuleList(TransformerBlock(width, context, heads) for _ in range(depth))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        h = self.enter(self.norm(x))
        shape = h.shape
        h = h.flatten(2).transpose(1, 2)
        for block in self.blocks:
            h = block(h, context)
        return x + self.leave(h.transpose(1, 2).reshape(shape))


class UNet(nn.Module):
    """The UNet; ``depths`` are the transformer blocks after each residual block, by level."""

    def __init__(self, channels: int = 32, depths: Sequence[int] = (1, 1, 1, 0), context: int = 64) -> None:
        super().__init__()
        widths = [channels, 2 * channels, 4 * channels, 4 * channels]
        time = 4 * channels
        self.channels, self.context = channels, context
        self.time = nn.Sequential(nn.Linear(channels, time), nn.SiLU(), nn.Linear(time, time))
        self.enter = nn.Conv2d(4, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        kept, before = [channels], channels
        for level, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for _ in range(2):
                self.down.append(self._stage(before, width, time, depth))
                kept, before = [*kept, width], width
            if level < 3:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                kept = [*kept, width]
        self.middle = nn.ModuleList([self._stage(before, before, time, 1), self._stage(before, before, time, 0)])
        for level, (width, depth) in reversed(list(enumerate(zip(widths, depths, strict=True)))):
            for _ in range(3):
                self.up.append(self._stage(before + kept.pop(), width, time, depth))
                before = width
            if level:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
        self.norm, self.leave = nn.GroupNorm(8, channels), nn.Conv2d(channels, 4, 3, padding=1)

    def _stage(self, before: int, width: int, time: int, depth: int) -> nn.ModuleList:
        stage = nn.ModuleList([ResBlock(before, width, time)])
        return stage.extend([SpatialTransformer(width, self.context, 4, depth)] if depth else [])

    def forward(self, x: Tensor, step: Tensor, context: Tensor) -> Tensor:
        half = self.channels // 2
        angles = step[:, None] * torch.exp(-math.log(10_000) / half * torch.arange(half, device=x.device))
        time = self.time(torch.cat([angles.sin(), angles.cos()], dim=-1))
        x = self.enter(x)
        kept = [x]
        for stage in self.down:
            x = self._run(stage, x, time, context)
            kept.append(x)
        for stage in self.middle:
            x = self._run(stage, x, time, context)
        for stage in self.up:
            if isinstance(stage, nn.Conv2d):
                x = stage(nn.functional.interpolate(x, scale_factor=2.0))
            else:
                x = self._run(stage, torch.cat([x, kept.pop()], dim=1), time, context)
        return self.leave(nn.functional.silu(self.norm(x)))

    def _run(self, stage: nn.Module, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        if isinstance(stage, nn.Conv2d):
            return stage(x)
        for part in stage:  # type: ignore[attr-defined]
            x = part(x, time if isinstance(part, ResBlock) else context)
        return x

    def example(self) -> tuple[Tensor, Tensor, Tensor]:
        """A call: two pictures, their time steps, and texts of 8 words."""
        return torch.randn(2, 4, 16, 16), torch.tensor([1.0, 500.0]), torch.randn(2, 8, self.context)
