"""Sums over groups, and their way back to the channels, without a reshape of x."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jgn._axes import Axes


class Groups:
    """The groups of x: arrays of x's shape are reduced to one value a group, and spread again.

    x itself is only ever reduced along its own spatial axes. What that leaves, one value a channel,
    is combined by a product with a matrix of two columns, ones and zeros, whose first column is
    each group's sum; spreading is the product with its transpose. XLA:CPU would fuse a plain
    broadcast, which is also the transpose of a plain sum, into the loop over x: an integer division
    of the channel index for each element, dearer than the rest of the loop. A product of inner
    size 2 it does not fuse.
    """

    def __init__(self, x: Array, axes: Axes, num_groups: int):
        channels = x.shape[axes.channel]
        self._axes = axes
        self._num_groups = num_groups
        self._size = channels // num_groups
        self._combines_channels = num_groups < channels
        sharding = jax.typeof(x).sharding
        self._channel_sharding = sharding.spec[axes.channel]
        self._span_devices = num_groups % _partitions(sharding, axes.channel) != 0

    def sum(self, x: Array) -> Array:
        return self._sum_of_channels(x.sum(self._axes.spatial, keepdims=True))

    def count(self, x: Array, mask: Array | None) -> Array:
        """How many elements count: one number for all groups, or with a mask one value a group."""
        real = jnp.finfo(x.dtype).dtype
        if mask is None:
            positions = math.prod(x.shape[axis] for axis in self._axes.spatial)
            return jnp.asarray(positions * self._size, real)
        repeats = math.prod(x.shape[axis] for axis in self._axes.spatial if mask.shape[axis] == 1)
        counted = mask.astype(real).sum(self._axes.spatial, keepdims=True) * repeats
        kept = [1 if axis in self._axes.spatial else size for axis, size in enumerate(x.shape)]
        return self._sum_of_channels(jnp.broadcast_to(counted, kept))

    def spread(self, per_group: Array) -> Array:
        """One value a group, in x's rank: ones for the axes along which it does not vary."""
        if not self._combines_channels:
            return per_group
        two_columns = jnp.concatenate([per_group, jnp.zeros_like(per_group)], axis=-1)
        return self._join(_matmul(two_columns, _first_of_two(self._size, per_group.dtype), 1))

    def sample(self, x: Array, one_in: int) -> Array:
        """At least one in so many positions of x, skipping along the first spatial axes first."""
        strides = [1] * x.ndim
        for axis in self._axes.spatial:
            size = x.shape[axis]
            if _partitions(jax.typeof(x).sharding, axis) > 1:
                continue  # Slices of an explicitly sharded axis must divide evenly.
            # A symbolic size is not known to be small.
            strides[axis] = min(one_in, size) if isinstance(size, int) else one_in
            one_in //= strides[axis]
        return lax.slice(x, (0,) * x.ndim, x.shape, strides)

    def _sum_of_channels(self, per_channel: Array) -> Array:
        if not self._combines_channels:
            return per_channel
        ones_and_zeros = _first_of_two(self._size, per_channel.dtype)
        return _matmul(self._split(per_channel), ones_and_zeros, 0)[..., :1]

    def _split(self, per_channel: Array) -> Array:
        last = jnp.moveaxis(per_channel, self._axes.channel, -1)
        if self._span_devices:
            last = _reshard_last(last, None)
        return last.reshape(*last.shape[:-1], self._num_groups, self._size)

    def _join(self, grouped: Array) -> Array:
        last = grouped.reshape(*grouped.shape[:-2], self._num_groups * self._size)
        if self._span_devices:
            last = _reshard_last(last, self._channel_sharding)
        return jnp.moveaxis(last, -1, self._axes.channel)


@functools.cache
def _first_of_two(size: int, dtype: Any) -> np.ndarray:
    # A constant, not jnp.ones or the like: XLA:CPU of jaxlib 0.10 to 0.12 gets the product of a sum
    # with a matrix that it makes on the way wrong.
    return np.tile(np.array([1, 0], dtype), (size, 1))


def _matmul(a: Array, b: np.ndarray, axis: int) -> Array:
    """Multiplies along the last axis of a and the given axis of b."""
    dimensions = (((a.ndim - 1,), (axis,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST)


def _partitions(sharding: NamedSharding, axis: int) -> int:
    """Over how many devices explicitly typed mesh axes split this axis."""
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


def _reshard_last(x: Array, sharding: str | tuple[str, ...] | None) -> Array:
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, PartitionSpec(*spec[:-1], sharding))
