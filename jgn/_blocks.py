"""Sums over all positions block by block, which is what a CPU is fast at.

XLA:CPU makes every sum in a pass of its own, and takes about as long again for each step that leads
to its terms. Only a sum of a few elements becomes part of a vectorized loop, along with its terms.
So the spatial axes are summed block by block, and what that leaves again, until little is left: the
first of these sums is the only one over an array of x's size.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jgn._axes import Axes
from jgn._positions import Positions, by_parts, is_on_one

# XLA:CPU unrolls a sum of so few elements; much smaller blocks leave too much for the next sums.
LARGEST_BLOCK = 20
SMALLEST_BLOCK = 5
# After blocks of so many positions in all, what is left is summed as it is,
ENOUGH = 64
# if it is not more than so many positions: a longer sum would round too much.
LONGEST = 256
# Of so few equal elements one sum is near enough to their multiple.
FEW = 128
# How many neighbours in memory a vectorized loop needs. Where they are positions, a block has
# every position that is so many after another.
NEIGHBOURS = 16


def positions_of(x: Array, axes: Axes) -> Positions:
    """The spatial axes of x, which are summed as the device wants it."""
    if not is_on_one("cpu", x):
        return Positions(x, axes)
    return ComplexPositions(x, axes) if jnp.iscomplexobj(x) else PositionsInBlocks(x, axes)


class Block(NamedTuple):
    """Along an axis, how many positions are summed at once, and how far apart these are."""

    axis: int
    size: int
    stride: int

    def sum(self, x: Array) -> Array:
        """Sums the blocks of x."""
        before, size, after = self._around(x)
        split = (size // (self.size * self.stride), self.size, self.stride)
        summed = x.reshape(*before, *split, *after).sum(self.axis + 1)
        return summed.reshape(*before, size // self.size, *after)

    def spread(self, x: Array) -> Array:
        """Repeats the elements of x as many times as `sum` adds up; its transpose."""
        before, size, after = self._around(x)
        split = (size // self.stride, 1, self.stride)
        shape = (*before, split[0], self.size, self.stride, *after)
        repeated = jnp.broadcast_to(x.reshape(*before, *split, *after), shape)
        return repeated.reshape(*before, size * self.size, *after)

    def _around(self, x: Array) -> tuple[tuple[int, ...], int, tuple[int, ...]]:
        return x.shape[: self.axis], x.shape[self.axis], x.shape[self.axis + 1 :]


class PositionsInBlocks(Positions):
    """The spatial axes of x, and the blocks, if any are possible, by which they are summed.

    A pair is one complex array, of whose two parts one loop makes both sums. It is conjugated after
    each block, as XLA would make one long sum of two short ones that follow each other.
    """

    def __init__(self, x: Array, axes: Axes):
        super().__init__(x, axes)
        self._blocks = _blocks(x.shape, axes.spatial)

    def sum(self, x: Array) -> Array:
        few = isinstance(self.number, int) and self.number <= FEW
        if few or not self._blocks:
            return self._sum_at_once(x)
        return self.parts(self.sums(x, x))[0]

    def sums(self, u: Array, v: Array) -> Array:
        if not self._blocks:
            return self.pair(self._sum_at_once(u), self._sum_at_once(v))
        both = lax.complex(u, v)
        for block in self._blocks:
            both = lax.conj(block.sum(both))
        return self._sum_at_once(both)

    def spread(self, pair: Array) -> tuple[Array, Array]:
        if not self._blocks:
            return super().spread(pair)
        shape = list(self._shape)
        for block in self._blocks:
            shape[block.axis] //= block.size
        both = jnp.broadcast_to(self.along(pair), shape)
        for block in reversed(self._blocks):
            both = block.spread(lax.conj(both))
        return both.real, both.imag

    def pair(self, u: Array, v: Array) -> Array:
        return self._as_after_the_blocks(lax.complex(u, v))

    def parts(self, pair: Array) -> tuple[Array, Array]:
        both = self._as_after_the_blocks(pair)
        return both.real, both.imag

    def once_a_channel(self, *values: Array) -> Sequence[Array]:
        return values  # They go a way of several steps, the first of which does that.

    def _as_after_the_blocks(self, both: Array) -> Array:
        """Each block has conjugated them; its own inverse."""
        return lax.conj(both) if len(self._blocks) % 2 else both


class ComplexPositions(Positions):
    """The spatial axes of a complex x, whose real and imaginary parts are summed by blocks.

    As they are, XLA:CPU would sum complex numbers one by one, which takes longer and rounds more.
    """

    def __init__(self, x: Array, axes: Axes):
        super().__init__(x, axes)
        self._of_a_part = PositionsInBlocks(x, axes)

    def sum(self, x: Array) -> Array:
        return by_parts(self._of_a_part.sum, x)

    def sums(self, u: Array, v: Array) -> Array:
        part = self._of_a_part
        return self.pair(*by_parts(lambda u, v: part.parts(part.sums(u, v)), u, v))

    def spread(self, pair: Array) -> tuple[Array, Array]:
        part = self._of_a_part
        return by_parts(lambda u, v: part.spread(part.pair(u, v)), *self.parts(pair))


def _blocks(shape: Sequence[int], spatial: Sequence[int]) -> list[Block]:
    """The blocks to sum, in this order; none if the largest possible would be too small."""
    sizes = {axis: shape[axis] for axis in spatial if isinstance(shape[axis], int)}  # Not symbolic.
    strides = {axis: NEIGHBOURS if axis == len(shape) - 1 else 1 for axis in sizes}
    blocks: list[Block] = []
    while math.prod(block.size for block in blocks) < ENOUGH or math.prod(sizes.values()) > LONGEST:
        possible = [
            (number, axis)
            for axis, size in sizes.items()
            for number in range(2, LARGEST_BLOCK + 1)
            if size % (number * strides[axis]) == 0
        ]
        if not possible:
            break
        number, axis = max(possible)
        blocks.append(Block(axis, number, strides[axis]))
        sizes[axis] //= number
    return blocks if blocks and blocks[0].size >= SMALLEST_BLOCK else []
