"""Sums over all positions part by part, which is what a GPU is fast at.

XLA:GPU gives one multiprocessor the sums over up to 4,096 positions, of a few channels at a time,
which for most inputs leaves most multiprocessors idle. So where channels are innermost, the
positions are summed part by part first. (Of two sums that follow each other XLA would make one
again; of pairs it does not.)
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jgn._axes import Axes, divisors
from jgn._devices import automatic_devices, partitions
from jgn._positions import Positions

# So many positions in a part keep the threads of a GPU's multiprocessor busy.
PART = 256
# With fewer, most threads would wait; with more, XLA:GPU makes parts by itself.
SMALLEST_PART, LARGEST_PART = 32, 4096
# How many sums over a part of so many channels give most multiprocessors one.
ENOUGH_SUMS, CHANNELS_OF_A_SUM = 128, 64


class Part(NamedTuple):
    """So many neighbours along a spatial axis of a shape, and all positions along those behind."""

    shape: tuple[int, ...]
    axis: int
    size: int

    @property
    def positions(self) -> int:
        return self.size * math.prod(self.shape[self.axis + 1 : -1])

    @property
    def shape_of_sums(self) -> tuple[int, ...]:
        """(*axes before, parts, channels)."""
        return *self._split[: self.axis + 1], self.shape[-1]

    def sum(self, x: Array) -> Array:
        """Σx over the positions of every part."""
        split = x.reshape(self.shape).reshape(self._split)  # Explicit shardings bear no other way.
        return split.sum(range(self.axis + 1, split.ndim - 1))

    def spread(self, sums: Array) -> Array:
        """Gives all positions of a part its value; the transpose of `sum`."""
        sums = jnp.expand_dims(sums, range(self.axis + 1, len(self.shape)))
        return jnp.broadcast_to(sums, self._split).reshape(self.shape)

    @property
    def _split(self) -> tuple[int, ...]:
        parts = self.shape[self.axis] // self.size
        return *self.shape[: self.axis], parts, self.size, *self.shape[self.axis + 1 :]


class PositionsInParts(Positions):
    """The spatial axes of x, and the parts, if any suit, by which they are summed."""

    def __init__(self, x: Array, axes: Axes):
        super().__init__(x, axes)
        self._part = _part(x, axes)

    def sum(self, x: Array) -> Array:
        return self.unpair(self.sums(x, x))[0] if self._part else super().sum(x)

    def sums(self, u: Array, v: Array) -> Array:
        if not self._part:
            return super().sums(u, v)
        of_parts = self.pair(*map(self._part.sum, (u, v)))
        return of_parts.sum(range(1 + len(self._axes.batch), of_parts.ndim - 1))

    def spread(self, pair: Array) -> tuple[Array, Array]:
        if not self._part:
            return super().spread(pair)
        of_parts = (2, *self._part.shape_of_sums)
        batch, last = len(self._axes.batch), len(of_parts) - 1
        pair = jnp.broadcast_to(pair, (*of_parts[: 1 + batch], of_parts[last]))
        pair = jnp.broadcast_to(jnp.expand_dims(pair, range(1 + batch, last)), of_parts)
        u, v = (self._part.spread(x).reshape(self._shape) for x in self.unpair(pair))
        return u, v


def _part(x: Array, axes: Axes) -> Part | None:
    """What is summed first; None where all positions are summed at once."""
    parts = _possible_parts(x, axes)
    if not parts:
        return None
    known = math.prod(size for size in x.shape[:-1] if isinstance(size, int))
    # Each device has its share of them, along whichever axis.
    sharing = automatic_devices(x) * math.prod(partitions(x, axis) for axis in range(x.ndim))
    sums = known * math.ceil(x.shape[-1] / CHANNELS_OF_A_SUM) // sharing
    many_enough = [part for part in parts if sums // part.positions >= ENOUGH_SUMS]
    smallest = min(parts, key=lambda part: part.positions)
    return min(
        many_enough or [smallest],
        key=lambda part: max(part.positions / PART, PART / part.positions),
    )


def _possible_parts(x: Array, axes: Axes) -> list[Part]:
    """Those of a size that suits; none unless channels are innermost, or if x tells of a split.

    Where devices may share any axis, no axis is merged with another, and of one that s of them can
    share there are parts in a multiple of s: shared by devices, it leaves each of them whole parts.
    """
    first = len(axes.batch)
    innermost = (*axes.spatial, axes.channel) == tuple(range(first, x.ndim))
    split = any(partitions(x, axis) > 1 for axis in axes.spatial)
    number = math.prod(x.shape[axis] for axis in axes.spatial)
    if not innermost or split or not isinstance(number, int):
        return []
    devices = automatic_devices(x)
    shape = x.shape if devices > 1 else (*x.shape[:first], number, x.shape[-1])
    return [
        part
        for axis in range(first, len(shape) - 1)
        for size in divisors(shape[axis] // math.gcd(shape[axis], devices))
        if SMALLEST_PART <= (part := Part(shape, axis, size)).positions <= LARGEST_PART
        and part.positions < number
    ]
