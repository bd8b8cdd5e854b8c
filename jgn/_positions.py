"""Sums over all positions, two in one pass over memory, and the way back to the positions.

XLA:CPU makes every sum in a pass of its own, and takes about as long again for each step that leads
to its terms. Only a sum of a few elements becomes part of a vectorized loop, along with its terms.
So on a CPU the spatial axes are summed block by block, and what that leaves again, until little is
left: the first of these sums is the only one over an array of x's size. It takes two arrays at
once, as the real and the imaginary part of one, and so does what follows, down to the groups. Other
backends get plain sums, which they fuse by themselves.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import NamedSharding

from jgn._axes import Axes

# XLA:CPU unrolls a sum of so few elements; much smaller blocks leave too much for the next sums.
LARGEST_BLOCK = 20
SMALLEST_BLOCK = 5
# What is left after blocks of so many positions in all is summed as it is.
ENOUGH = 64
# Of so few equal elements one sum is near enough to their multiple.
FEW = 128
# How many neighbours in memory a vectorized loop needs. Where they are positions, a block has
# every position that is so many after another.
NEIGHBOURS = 16


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


# Two arrays, or where there are blocks a complex one of which they are the parts. It is conjugated
# after each block, as XLA would make one long sum of two short ones that follow each other.
Pair = tuple[Array, ...]


class Positions:
    """The spatial axes of x, and the blocks by which they are summed where that is faster."""

    def __init__(self, x: Array, axes: Axes):
        self._shape = x.shape
        self._axes = axes
        in_blocks = is_on_one_cpu(x) and not jnp.iscomplexobj(x)
        self._blocks = _blocks(x.shape, axes.spatial) if in_blocks else []

    @property
    def number(self) -> int:
        return math.prod(self._shape[axis] for axis in self._axes.spatial)

    def count(self, mask: Array, dtype: Any) -> Array:
        """How many positions are True in a mask of x's rank, (*batch, channels)."""
        repeated = (axis for axis in self._axes.spatial if mask.shape[axis] == 1)
        repeats = math.prod(self._shape[axis] for axis in repeated)
        shape = [self._shape[axis] for axis in (*self._axes.batch, self._axes.channel)]
        return jnp.broadcast_to(self.of(mask).sum(mask.astype(dtype)) * repeats, shape)

    def sum(self, x: Array) -> Array:
        """Σx over all positions, (*batch, channels)."""
        few = isinstance(self.number, int) and self.number <= FEW
        if few or not self._blocks:
            return self._sum_at_once(x)
        return self.parts(self.sums(x, x))[0]

    def sums(self, u: Array, v: Array) -> Pair:
        """Σu and Σv over all positions, (*batch, channels)."""
        if not self._blocks:
            return self._sum_at_once(u), self._sum_at_once(v)
        both = lax.complex(u, v)
        for block in self._blocks:
            both = lax.conj(block.sum(both))
        return (self._sum_at_once(both),)

    def along(self, values: Array) -> Array:
        """Lays (*batch, channels) out along the axes of x, with ones elsewhere."""
        owners = (*self._axes.batch, self._axes.channel)
        in_order = jnp.transpose(values, sorted(range(len(owners)), key=owners.__getitem__))
        return jnp.expand_dims(in_order, self._axes.spatial)

    def spread(self, pair: Pair) -> tuple[Array, Array]:
        """Gives every position the two values of its channel; the transpose of `sums`."""
        if not self._blocks:
            u, v = map(self.along, pair)
            return u, v  # They broadcast by themselves.
        shape = list(self._shape)
        for block in self._blocks:
            shape[block.axis] //= block.size
        both = jnp.broadcast_to(self.along(*pair), shape)
        for block in reversed(self._blocks):
            both = block.spread(lax.conj(both))
        return both.real, both.imag

    def pair(self, u: Array, v: Array) -> Pair:
        """Two values a channel or a group as `sums` gives them."""
        if not self._blocks:
            return u, v
        return (self._as_after_the_blocks(lax.complex(u, v)),)

    def parts(self, pair: Pair) -> tuple[Array, Array]:
        """The two values of a pair."""
        if not self._blocks:
            u, v = pair
            return u, v
        both = self._as_after_the_blocks(*pair)
        return both.real, both.imag

    def _as_after_the_blocks(self, both: Array) -> Array:
        """Each block has conjugated them; its own inverse."""
        return lax.conj(both) if len(self._blocks) % 2 else both

    def _sum_at_once(self, x: Array) -> Array:
        channel = sum(axis < self._axes.channel for axis in self._axes.batch)
        return jnp.moveaxis(x.sum(self._axes.spatial), channel, -1)

    def of(self, x: Array) -> "Positions":
        """Those of another array with the same axes."""
        return Positions(x, self._axes)

    def sample(self, x: Array, one_in: int) -> Array:
        """At least one in so many positions of x, skipping along the first spatial axes first."""
        strides = [1] * x.ndim
        for axis in self._axes.spatial:
            if partitions(jax.typeof(x).sharding, axis) > 1:
                continue  # Slices of an explicitly sharded axis must divide evenly.
            strides[axis] = _stride(x.shape[axis], one_in, _devices(x))
            one_in //= strides[axis]
        return lax.slice(x, (0,) * x.ndim, x.shape, strides)


def is_on_one_cpu(x: Array) -> bool:
    """Whether x is traced for one CPU, and for more than one operation at a time.

    Where devices share an axis, what is summed over a part of it would travel between them.
    """
    alone = jax.default_backend() == "cpu" and _devices(x) == 1
    return alone and not jax.config.jax_disable_jit


def _devices(x: Array) -> int:
    """The number of devices that may share x, as far as tracing tells."""
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty:
        mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def _stride(size: int, one_in: int, devices: int) -> int:
    if not isinstance(size, int):
        return one_in  # A symbolic size is not known to be small.
    if devices == 1 or size <= one_in:
        return min(one_in, size)
    # Strides that divide what each device has of an axis move nothing between devices.
    on_each = size // devices if size % devices == 0 else 1
    return max(stride for stride in range(1, one_in + 1) if on_each % stride == 0)


def partitions(sharding: NamedSharding, axis: int) -> int:
    """Over how many devices explicitly typed mesh axes split this axis."""
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


def _blocks(shape: Sequence[int], spatial: Sequence[int]) -> list[Block]:
    """The blocks to sum, in this order; none if the largest possible would be too small."""
    sizes = {axis: shape[axis] for axis in spatial if isinstance(shape[axis], int)}  # Not symbolic.
    strides = {axis: NEIGHBOURS if axis == len(shape) - 1 else 1 for axis in sizes}
    blocks: list[Block] = []
    while math.prod(block.size for block in blocks) < ENOUGH:
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
