"""Sums over all positions, two in one pass over memory, and the way back to the positions.

XLA:CPU makes every sum in a pass of its own, and takes about as long again for each step that leads
to its terms. Only a sum of a few elements becomes part of a vectorized loop, along with its terms.
So on a CPU the spatial axes are split into blocks that are summed one after the other: the first of
these sums is the only one over an array of x's size. It takes two arrays at once, as the real and
the imaginary part of one. Other backends get plain sums, which they fuse by themselves.
"""

import itertools
import math
from collections.abc import Sequence

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
# How many neighbours in memory a vectorized loop needs, where they have to be positions.
LANES = 16


class Positions:
    """The spatial axes of x, split into blocks where that makes sums faster."""

    def __init__(self, x: Array, axes: Axes):
        self._shape = x.shape
        self._spatial = axes.spatial
        # The sizes into which each axis is split and, counted over all axes, which of these parts
        # are summed first, in this order, and which are the other spatial ones.
        self._parts: list[tuple[int, ...]] = [(size,) for size in x.shape]
        self._blocks: list[int] = []
        self._rest: list[int] = []
        if is_on_one_cpu(x) and not jnp.iscomplexobj(x):
            self._split_into_blocks()

    def _split_into_blocks(self) -> None:
        contiguous = len(self._shape) - 1
        parts = self._parts.copy()
        for axis in self._spatial:
            size = self._shape[axis]
            if not isinstance(size, int):  # But symbolic.
                continue
            left, *blocks = _factors(size, least=LANES if axis == contiguous else 1)
            parts[axis] = (*blocks, left) if axis == contiguous else (left, *blocks)
        sizes = list(itertools.chain(*parts))
        numbers = iter(range(len(sizes)))
        numbers_of_axis = [[next(numbers) for _ in parts_of_axis] for parts_of_axis in parts]
        spatial = [number for axis in self._spatial for number in numbers_of_axis[axis]]
        possible = [
            number
            for number in spatial
            if number != len(sizes) - 1 and sizes[number] in range(2, LARGEST_BLOCK + 1)
        ]
        blocks = []
        for number in sorted(possible, key=lambda number: (sizes[number], number), reverse=True):
            if math.prod(sizes[block] for block in blocks) < ENOUGH:
                blocks.append(number)
        if blocks and sizes[blocks[0]] >= SMALLEST_BLOCK:
            self._parts, self._blocks = parts, blocks
            self._rest = [number for number in spatial if number not in blocks]

    @property
    def number(self) -> int:
        return math.prod(self._shape[axis] for axis in self._spatial)

    def sum(self, x: Array) -> Array:
        """Σx over all positions, with ones in place of the spatial axes."""
        return x.sum(self._spatial, keepdims=True)

    def sums(self, u: Array, v: Array) -> tuple[Array, Array]:
        """Σu and Σv over all positions, with ones in place of the spatial axes."""
        if not self._blocks:
            return self.sum(u), self.sum(v)
        u, v = _sums(self._split(u), self._split(v), self._blocks, self._rest)
        return self._join(u), self._join(v)

    def spread(self, a: Array, b: Array) -> tuple[Array, Array]:
        """Gives every position a and b, at most one value a channel; the transpose of `sums`."""
        if not self._blocks:
            return a, b  # They broadcast by themselves.
        per_channel = [1 if axis in self._spatial else n for axis, n in enumerate(self._shape)]
        a, b = (self._split(jnp.broadcast_to(c, per_channel)) for c in (a, b))
        a, b = _spread(a, b, self._blocks, self._rest, list(itertools.chain(*self._parts)))
        return self._join(a), self._join(b)

    def sample(self, x: Array, one_in: int) -> Array:
        """At least one in so many positions of x, skipping along the first spatial axes first."""
        strides = [1] * x.ndim
        for axis in self._spatial:
            size = x.shape[axis]
            if partitions(jax.typeof(x).sharding, axis) > 1:
                continue  # Slices of an explicitly sharded axis must divide evenly.
            # A symbolic size is not known to be small.
            strides[axis] = min(one_in, size) if isinstance(size, int) else one_in
            one_in //= strides[axis]
        return lax.slice(x, (0,) * x.ndim, x.shape, strides)

    def _split(self, x: Array) -> Array:
        """Splits the axes of an array that broadcasts to x."""
        sizes = []
        for size, parts in zip(x.shape, self._parts, strict=True):
            sizes += parts if size == math.prod(parts) else [1] * len(parts)
        return x.reshape(sizes)

    def _join(self, x: Array) -> Array:
        sizes = iter(x.shape)
        return x.reshape([math.prod(next(sizes) for _ in parts) for parts in self._parts])


def is_on_one_cpu(x: Array) -> bool:
    """Whether x is traced for a CPU, and lies on no mesh of devices.

    Where devices share an axis, what is summed over a part of it would travel between them.
    """
    return jax.default_backend() == "cpu" and jax.typeof(x).sharding.mesh.empty


def partitions(sharding: NamedSharding, axis: int) -> int:
    """Over how many devices explicitly typed mesh axes split this axis."""
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


def _factors(size: int, least: int) -> tuple[int, ...]:
    """Factors of a size: what is left, `least` or more, and blocks, as large as they may be."""
    possible = [
        block
        for block in range(2, LARGEST_BLOCK + 1)
        if size % block == 0 and size // block >= least
    ]
    if not possible:
        return (size,)
    block = max(possible)
    return (*_factors(size // block, least), block)


def _sums(u: Array, v: Array, blocks: Sequence[int], rest: Sequence[int]) -> tuple[Array, Array]:
    if not blocks:
        return u.sum(tuple(rest), keepdims=True), v.sum(tuple(rest), keepdims=True)
    both = lax.complex(u, v).sum(blocks[0], keepdims=True)
    # The parts change places, as XLA would make one long sum of two short ones.
    v, u = _sums(both.imag, both.real, blocks[1:], rest)
    return u, v


def _spread(
    a: Array, b: Array, blocks: Sequence[int], rest: Sequence[int], sizes: Sequence[int]
) -> tuple[Array, Array]:
    """`_sums` backwards, step by step, so that its transpose takes the same steps."""
    if not blocks:
        return _repeat(a, rest, sizes), _repeat(b, rest, sizes)
    b, a = _spread(b, a, blocks[1:], rest, sizes)
    both = _repeat(lax.complex(a, b), blocks[:1], sizes)
    return both.real, both.imag


def _repeat(x: Array, axes: Sequence[int], sizes: Sequence[int]) -> Array:
    shape = [sizes[axis] if axis in axes else size for axis, size in enumerate(x.shape)]
    return jnp.broadcast_to(x, shape)
