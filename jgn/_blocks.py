"""Sums over all positions block by block, which is what a CPU is fast at.

XLA:CPU makes every sum in a pass of its own, and takes about as long again for each step that leads
to its terms. Only a sum of a few elements becomes part of a vectorized loop, along with its terms.
So the spatial axes are summed block by block, and what that leaves again, until little is left: the
first of these sums is the only one over an array of x's size.
"""

import functools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jgn._axes import Axes
from jgn._devices import devices_of_a_sample, devices_of_an_axis, partitions
from jgn._positions import Positions, by_components

# XLA:CPU unrolls a sum of so few elements; much smaller blocks leave too much for the next sums,
# and are made only where no others can be.
LARGEST_BLOCK = 20
SMALLEST_BLOCK = 5
# Where elements of 2 bytes are widened on the way, the unrolled loop is vectorized up to so many.
LARGEST_NARROW_BLOCK = 16
# The loop over padded blocks has a branch for each of their positions: vectorized up to so many.
LARGEST_PADDED_BLOCK = 13
# Once blocks cover so many positions, what is left is summed at once, unless it is long: more than
# so many positions along one axis, or along several, would round too much. (XLA:CPU sums 32 after
# 32 along one axis, but term by term along several.)
ENOUGH, LONGEST, LONGEST_OF_SEVERAL = 64, 256, 64
# Symbolic axes have blocks of so many positions, until these cover so many in all: to pad the last
# is cheap unless there are few, and what is left is mostly short.
SYMBOLIC_BLOCK, ENOUGH_SYMBOLIC = 8, 4096
# Of so many equal elements, at most, one sum is near enough to their multiple.
MOST_OF_ONE_SUM = 128
# How many neighbours in memory a vectorized loop needs. Where they are positions, a block has
# every position that is so many after another.
NEIGHBOURS = 16


class Block(NamedTuple):
    """Along an axis of so many positions, how many are summed at once, and how far apart these are.

    What the last block lacks is padding.
    """

    axis: int
    positions: Any  # An int, or symbolic.
    size: int
    stride: int

    @property
    def segments(self) -> Any:
        """How many parts of size · stride neighbours there are, in which blocks alternate."""
        return -(-self.positions // (self.size * self.stride))

    @property
    def _strides(self) -> tuple[int, ...]:
        """The axis along which blocks alternate; none where a block's positions are neighbours."""
        return () if self.stride == 1 else (self.stride,)

    @property
    def left(self) -> Any:
        """How many positions there are after it."""
        return self.segments * self.stride

    @property
    def padding(self) -> Any:
        """How many positions the last block lacks."""
        return self.left * self.size - self.positions

    @property
    def may_be_padded(self) -> bool:
        return not isinstance(self.positions, int) or self.padding > 0

    def sum(self, x: Array) -> Array:
        """Sums the blocks of x."""
        before, after = x.shape[: self.axis], x.shape[self.axis + 1 :]
        padded = self._padded(x) if self.may_be_padded else x
        # In two steps, as an explicitly split axis bears no other way.
        in_strides = padded.reshape(*before, self.segments * self.size, *self._strides, *after)
        split = in_strides.reshape(*before, self.segments, self.size, *self._strides, *after)
        return lax.reduce_sum(split, [self.axis + 1]).reshape(*before, self.left, *after)

    def spread(self, x: Array) -> Array:
        """Repeats the elements of x as many times as `sum` adds up; its transpose."""
        before, after = x.shape[: self.axis], x.shape[self.axis + 1 :]
        blocks = x.reshape(*before, self.segments, *self._strides, *after)
        split = (*before, self.segments, self.size, *self._strides, *after)
        others = [axis for axis in range(len(split)) if axis != self.axis + 1]
        repeated = lax.broadcast_in_dim(blocks, split, others)
        in_strides = repeated.reshape(*before, self.segments * self.size, *self._strides, *after)
        padded = in_strides.reshape(*before, self.left * self.size, *after)
        return self._cut(padded) if self.may_be_padded else padded

    # By components, as XLA:CPU does not vectorize a loop that pads complex numbers.
    def _padded(self, x: Array) -> Array:
        behind = [(0, self.padding if axis == self.axis else 0, 0) for axis in range(x.ndim)]
        return by_components(lambda real: lax.pad(real, jnp.zeros((), real.dtype), behind), x)

    def _cut(self, x: Array) -> Array:
        return by_components(
            lambda real: lax.slice_in_dim(real, 0, self.positions, axis=self.axis), x
        )


class PositionsInBlocks(Positions):
    """The spatial axes of x, and the blocks, if any are possible, by which they are summed.

    A pair is one complex array, of whose two components one loop makes both sums. It is conjugated
    after each block, as XLA would make one long sum of two short ones that follow each other.
    Without blocks sums are plain where several devices may share the positions: there may be too
    many for such a loop.

    The last few positions may be added one by one, which XLA makes part of the loop over channels
    that follows, if x has no gradient; it would be a padding for each.
    """

    def __init__(self, x: Array, axes: Axes, few: int = 1):
        super().__init__(x, axes)
        largest = LARGEST_BLOCK if x.dtype.itemsize > 2 else LARGEST_NARROW_BLOCK
        self._few = few if isinstance(self.number, int) else 1
        self._blocks = _blocks(x, axes, largest, self._few)
        self._sums_are_plain = not self._blocks and not self.on_one_cpu
        is_split = any(partitions(x, axis) > 1 for axis in axes.spatial)
        self._explicit_sharding = jax.typeof(x).sharding if is_split else None

    def sum(self, x: Array) -> Array:
        one_sum_will_do = isinstance(self.number, int) and self.number <= MOST_OF_ONE_SUM
        if one_sum_will_do or not self._blocks:
            return self._sum_at_once(x)
        return self._sum_at_once(self._sums_of_blocks(x, x).real)

    def sums(self, u: Array, v: Array) -> Array:
        if self._sums_are_plain:
            return super().sums(u, v)
        return self._sum_at_once(self._sums_of_blocks(u, v))

    def spread(self, pair: Array) -> tuple[Array, Array]:
        if self._sums_are_plain:
            return super().spread(pair)
        shape = list(self._shape)
        for block in self._blocks:
            shape[block.axis] = block.left
        both = jnp.broadcast_to(self.along(pair), shape, out_sharding=self._explicit_sharding)
        for block in reversed(self._blocks):
            both = block.spread(lax.conj(both))
        return both.real, both.imag

    def pair(self, u: Array, v: Array) -> Array:
        return self._as_after_the_blocks(lax.complex(u, v))

    def unpair(self, pair: Array) -> tuple[Array, Array]:
        both = self._as_after_the_blocks(pair)
        return both.real, both.imag

    @property
    def are_padded(self) -> bool:
        return bool(self._blocks) and self._blocks[0].may_be_padded

    def of(self, x: Array, axes: Axes | None = None, few: int = 1) -> Positions:
        return PositionsInBlocks(x, self._axes if axes is None else axes, few)

    def once_a_channel(self, *values: Array) -> Sequence[Array]:
        # On one CPU `Groups` sees to that.
        return values if self.on_one_cpu else super().once_a_channel(*values)

    def _sum_at_once(self, x: Array) -> Array:
        spatial = self._axes.spatial
        if self._few == 1 or math.prod(x.shape[axis] for axis in spatial) > self._few:
            return super()._sum_at_once(x)
        for axis in spatial:
            x = functools.reduce(lax.add, lax.split(x, [1] * x.shape[axis], axis))
        return self._channels_last(lax.squeeze(x, spatial))

    def _sums_of_blocks(self, u: Array, v: Array) -> Array:
        both = lax.complex(u, v)
        for block in self._blocks:
            both = lax.conj(block.sum(both))
        return both

    def _as_after_the_blocks(self, both: Array) -> Array:
        """Each block has conjugated them; its own inverse."""
        return lax.conj(both) if len(self._blocks) % 2 else both


class ComplexPositions(Positions):
    """The spatial axes of a complex x, whose real and imaginary parts are summed by blocks.

    As they are, XLA:CPU would sum complex numbers one by one, which takes longer and rounds more.
    """

    def __init__(self, x: Array, axes: Axes):
        super().__init__(x, axes)
        self._of_a_component = PositionsInBlocks(x, axes)

    @property
    def are_padded(self) -> bool:
        return self._of_a_component.are_padded

    def sum(self, x: Array) -> Array:
        return by_components(self._of_a_component.sum, x)

    def sums(self, u: Array, v: Array) -> Array:
        component = self._of_a_component
        return self.pair(*by_components(lambda u, v: component.unpair(component.sums(u, v)), u, v))

    def spread(self, pair: Array) -> tuple[Array, Array]:
        component = self._of_a_component
        return by_components(
            lambda u, v: component.spread(component.pair(u, v)), *self.unpair(pair)
        )


def _blocks(x: Array, axes: Axes, largest: int, few: int) -> list[Block]:
    """The blocks of at most so many positions to sum, in this order; none once few are left.

    There are none for a single position, nor for too few neighbours in memory. Of an axis that s
    devices may share there are a multiple of s, none of them padded, so that no device has part of
    one; so there are none of symbolic sizes then.
    """
    known = {axis: x.shape[axis] for axis in axes.spatial if isinstance(x.shape[axis], int)}
    symbolic = {axis: x.shape[axis] for axis in axes.spatial if axis not in known}
    blocks = _blocks_of_known_sizes(x, known, largest, few)
    if symbolic and devices_of_a_sample(x, axes) == 1:
        blocks += _blocks_of_symbolic_sizes(x, symbolic, _positions_in(blocks))
    return blocks


def _blocks_of_known_sizes(x: Array, sizes: dict[int, int], largest: int, few: int) -> list[Block]:
    """Those of whole blocks, if there are large ones, else those that cost least with padding."""
    sizes, blocks = dict(sizes), []
    shares = {axis: math.gcd(size, devices_of_an_axis(x, axis)) for axis, size in sizes.items()}
    while math.prod(sizes.values()) > few and (
        _positions_in(blocks) < ENOUGH or _is_long(sizes.values())
    ):
        possible = [
            block
            for axis, positions in sizes.items()
            for size in range(2, largest + 1)
            if not (block := Block(axis, positions, size, _stride(x, axis))).segments % shares[axis]
        ]
        whole = [block for block in possible if not block.may_be_padded]
        large = [block for block in whole if blocks or block.size >= SMALLEST_BLOCK]
        may_pad = not blocks or _is_long(sizes.values())
        of_one_device = [block for block in possible if may_pad and shares[block.axis] == 1]
        block = _largest(large) or _best_padded(of_one_device) or _largest(whole)
        if block is None:
            break
        blocks.append(block)
        sizes[block.axis] = block.left
    return blocks


def _blocks_of_symbolic_sizes(x: Array, sizes: dict[int, Any], positions: int) -> list[Block]:
    """Those that do for sizes of any kind, after blocks of so many positions.

    Along neighbours in memory, of which few would mostly be padding, if there is no other axis.
    """
    sizes, blocks = dict(sizes), []
    axes = [axis for axis in sizes if _stride(x, axis) == 1] or list(sizes)
    while positions * _positions_in(blocks) < ENOUGH_SYMBOLIC:
        for axis in axes:
            blocks.append(Block(axis, sizes[axis], SYMBOLIC_BLOCK, _stride(x, axis)))
            sizes[axis] = blocks[-1].left
    return blocks


def _stride(x: Array, axis: int) -> int:
    return NEIGHBOURS if axis == x.ndim - 1 else 1


def _positions_in(blocks: Iterable[Block]) -> int:
    """Over how many positions they sum in all."""
    return math.prod(block.size for block in blocks)


def _is_long(sizes: Collection[int]) -> bool:
    several = sum(size > 1 for size in sizes) > 1
    return math.prod(sizes) > (LONGEST_OF_SEVERAL if several else LONGEST)


def _largest(blocks: Iterable[Block]) -> Block | None:
    return max(blocks, key=lambda block: (block.size, block.axis), default=None)


def _best_padded(blocks: Iterable[Block]) -> Block | None:
    """The blocks that cost least, of those that padding may fill."""

    def cost(block: Block) -> tuple[float, int]:
        """What is summed, padding included, and what is left, for each position."""
        return block.left * (block.size + 1) / block.positions, -block.axis

    possible = [
        block
        for block in blocks
        if SMALLEST_BLOCK <= block.size <= LARGEST_PADDED_BLOCK
        and (block.size - 1) * block.stride < block.positions
    ]
    return min(possible, key=cost, default=None)
