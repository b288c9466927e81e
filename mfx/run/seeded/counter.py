"""Random numbers as a function of a seed, a place in the program and an element's index.

1. A *site* (which call of a random operation) and a 64-bit seed, held by a tensor, give two 32-bit keys.
2. An element's bits are two rounds of a 32-bit integer hash of its index, one for each key.
3. Bits become decisions, uniform numbers, exponential and normal ones.

Every operation is plain arithmetic on int64, in which no product overflows, so that eager mode and each compiler
give the same bits.

A compiler that sees forward and backward compute the same bits would do so once and keep them in between.  So the
recomputation writes the same numbers in another way: the seed as its twin (some bits turned) turned back, indices
counted from 1.

Source: the hash is "lowbias32" of C. Wellons' hash-prospector (constants 21f0aaad and d35a2d97); the idea of
counter-based generators is Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
Known limits: 32 bits an element, so uniform numbers are multiples of 2**-32; indices count modulo 2**64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_FIRST, _SECOND = 0x21F0AAAD, 0xD35A2D97
_GOLDEN = 0x9E3779B9


_TWIN = 0x5DEECE66D2C7A9B1


@dataclass(frozen=True)
class Seed:
    """A 64-bit seed; ``start``, from which indices are counted, changes none of the values.

    It tells a recomputation from the first run, and one segment from another: a compiler would share what is the same.
    """

    value: Tensor
    start: int = 0

    def twin(self) -> Tensor:
        """What forward keeps, for :meth:`of_twin`."""
        return self.value ^ _TWIN

    @staticmethod
    def of_twin(twin: Tensor) -> Seed:
        """The seed as the recomputation writes it."""
        return Seed(twin ^ _TWIN, start=1)

    def index(self, count: int) -> Tensor:
        """0, 1, ... on the seed's device."""
        index = torch.arange(self.start, count + self.start, device=self.value.device, dtype=torch.int64)
        return index - self.start if self.start else index


def draw_seed(like: Tensor) -> Tensor:
    """A seed from torch's own generator, on the device of ``like``."""
    return torch.randint(-(2**62), 2**62, (), dtype=torch.int64, device=like.device)


def bits(shape: Sequence[int], seed: Seed, site: int) -> Tensor:
    """32 random bits for each element, as an int64 tensor on the seed's device.

    >>> seed = Seed(torch.tensor(7))
    >>> torch.equal(bits((2, 3), seed, 0), bits((2, 3), seed, 0)), torch.equal(bits((6,), seed, 0), bits((6,), seed, 1))
    (True, False)
    """
    low, high = site & _MASK, site >> 32
    first = _mix((seed.value & _MASK) ^ _mix_number(low))
    second = _mix(((seed.value >> 32) & _MASK) ^ _mix_number(high ^ _mix_number(low ^ _GOLDEN)))
    index = seed.index(math.prod(shape)).reshape(tuple(shape))
    once = _mix((index & _MASK) ^ first)
    return _mix(once ^ second ^ ((index >> 32) & _MASK))


def keeps(shape: Sequence[int], seed: Seed, site: int, p: float) -> Tensor:
    """Decisions that are False with probability ``p``."""
    return bits(shape, seed, site) >= round(p * 2**32)


def uniform(shape: Sequence[int], seed: Seed, site: int, dtype: torch.dtype) -> Tensor:
    """Numbers in [0, 1), never rounded up to 1."""
    digits = min(32, 1 - round(math.log2(torch.finfo(dtype).eps)))
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    return ((bits(shape, seed, site) >> (32 - digits)).to(wide) * 2.0**-digits).to(dtype)


def exponential(shape: Sequence[int], seed: Seed, site: int) -> Tensor:
    """Numbers of the exponential distribution of rate 1, in float64, all above 0."""
    return -_inside(bits(shape, seed, site)).log()


def normal(shape: Sequence[int], seed: Seed, site: int, second: int) -> Tensor:
    """Numbers of the standard normal distribution, in float64, from two sites (Box and Muller)."""
    radius = (2 * exponential(shape, seed, site)).sqrt()
    return radius * (2 * math.pi * _inside(bits(shape, seed, second))).cos()


def _inside(drawn: Tensor) -> Tensor:
    """Numbers in (0, 1)."""
    return (drawn.to(torch.float64) + 0.5) * 2.0**-32


def _mix(value: Tensor) -> Tensor:
    """A bijection of the 32-bit numbers, held as int64."""
    value = value ^ (value >> 16)
    value = (value * _signed(_FIRST)) & _MASK
    value = value ^ (value >> 15)
    value = (value * _signed(_SECOND)) & _MASK
    return value ^ (value >> 15)


def _mix_number(value: int) -> int:
    value &= _MASK
    value ^= value >> 16
    value = (value * _FIRST) & _MASK
    value ^= value >> 15
    value = (value * _SECOND) & _MASK
    return value ^ (value >> 15)


def _signed(factor: int) -> int:
    """The factor modulo 2**32 in [-2**31, 2**31), so that a product with 32 bits stays below 2**63."""
    return factor - (1 << 32) if factor >= (1 << 31) else factor
