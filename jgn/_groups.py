"""Sums over the channels of a group, and their way back to the channels."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import PartitionSpec

from jgn._axes import Axes
from jgn._positions import is_on_one_cpu, partitions

# How many elements a vectorized loop of XLA:CPU takes at once. A plain broadcast from groups to
# channels is fused into the loop over x, which for groups of another size divides an index for each
# element, dearer than the rest of the loop.
LANES = 8


class Groups:
    """The groups of x's channels: from a value a channel to its sum over a group, and back.

    Where a plain broadcast is dear, a broadcast is a product with a matrix of two columns, ones and
    zeros, as a product of inner size 2 is not fused; and a sum, whose transpose is a broadcast, the
    product with the transpose.
    """

    def __init__(self, x: Array, axes: Axes, num_groups: int):
        channels = x.shape[axes.channel]
        self._axes = axes
        self._num_groups = num_groups
        self.size = channels // num_groups
        self._combines_channels = 1 < num_groups < channels
        in_the_innermost_loop = axes.channel == x.ndim - 1
        self._multiplies = in_the_innermost_loop and self.size % LANES != 0 and is_on_one_cpu(x)
        sharding = jax.typeof(x).sharding
        self._channel_sharding = sharding.spec[axes.channel]
        self._span_devices = num_groups % partitions(sharding, axes.channel) != 0

    def sum(self, per_channel: Array) -> Array:
        """Sums a value a channel over every group.

        The result broadcasts to the channels only once it is spread.
        """
        if self._num_groups == 1:
            return per_channel.sum(self._axes.channel, keepdims=True)
        if not self._combines_channels:
            return per_channel
        grouped = self._split(per_channel)
        if not self._multiplies:
            return grouped.sum(-1, keepdims=True)
        return _matmul(grouped, _first_of_two(self.size, grouped.dtype), 0)[..., :1]

    def spread(self, per_group: Array) -> Array:
        """Gives every channel its group's value, in x's rank: ones for the axes of no change."""
        if not self._combines_channels:
            return per_group
        if not self._multiplies:
            shape = (*per_group.shape[:-1], self.size)
            return self._join(jnp.broadcast_to(per_group, shape))
        two_columns = jnp.concatenate([per_group, jnp.zeros_like(per_group)], axis=-1)
        return self._join(_matmul(two_columns, _first_of_two(self.size, per_group.dtype), 1))

    def count(self, x: Array, mask: Array | None) -> Array:
        """How many elements count: one number for all groups, or with a mask one value a group."""
        real = jnp.finfo(x.dtype).dtype
        if mask is None:
            positions = math.prod(x.shape[axis] for axis in self._axes.spatial)
            return jnp.asarray(positions * self.size, real)
        repeats = math.prod(x.shape[axis] for axis in self._axes.spatial if mask.shape[axis] == 1)
        counted = mask.astype(real).sum(self._axes.spatial, keepdims=True) * repeats
        kept = [1 if axis in self._axes.spatial else size for axis, size in enumerate(x.shape)]
        return self.sum(jnp.broadcast_to(counted, kept))

    def _split(self, per_channel: Array) -> Array:
        last = jnp.moveaxis(per_channel, self._axes.channel, -1)
        if self._span_devices:
            last = _reshard_last(last, None)
        return last.reshape(*last.shape[:-1], self._num_groups, self.size)

    def _join(self, grouped: Array) -> Array:
        last = grouped.reshape(*grouped.shape[:-2], self._num_groups * self.size)
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


def _reshard_last(x: Array, sharding: str | tuple[str, ...] | None) -> Array:
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, PartitionSpec(*spec[:-1], sharding))
