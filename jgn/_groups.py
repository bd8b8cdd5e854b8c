"""Sums over the channels of a group, and their way back to the channels."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import NamedSharding, PartitionSpec

from jgn._axes import Axes
from jgn._blocks import LARGEST_BLOCK
from jgn._devices import partitions
from jgn._positions import Positions

# How many elements a vectorized loop of XLA:CPU takes at once. A plain broadcast from groups to
# channels is fused into the loop over x, which for groups of no multiple of this size divides an
# index for each element, dearer than the rest of the loop.
LANES = 8
# Neighbours XLA:CPU adds one after another. So many of them, or more, are added lane by lane first;
# along two axes, as along one it would add so many after so many, in a loop more.
MANY = 32
# How many rows of a product XLA:CPU makes at once. It sums rows that are left in another order.
ROWS = 4


class Groups:
    """The groups of channels, along the last axis: from values a channel to their sums, and back.

    Where a plain broadcast is dear, a broadcast is a product with a matrix of two columns, ones and
    zeros, as a product of inner size 2 is not fused; and a sum, whose transpose is a broadcast, the
    product with the transpose.
    """

    def __init__(self, x: Array, axes: Axes, num_groups: int, positions: Positions):
        self._num_groups = num_groups
        self.size = x.shape[axes.channel] // num_groups
        in_the_innermost_loop = axes.channel == x.ndim - 1
        on_one_cpu = positions.on_one_cpu
        self._is_one_column = num_groups == 1 and not on_one_cpu
        # A loop with branches is not vectorized if its iterations share a value inside of them.
        dear = positions.are_padded if num_groups == 1 else self.size % LANES != 0
        self._multiplies = on_one_cpu and in_the_innermost_loop and dear and self.size != 1
        self._broadcasts_on_one_cpu = on_one_cpu and not self._multiplies
        has_lanes = self._broadcasts_on_one_cpu and self.size >= MANY
        self._lane_shape = _split_into_lanes(self.size) if has_lanes else (self.size, 1, 1)
        # How many positions may be added along with the channels of a lane, still unrolled.
        self.few_positions = max(1, LARGEST_BLOCK * LANES // self.size) if has_lanes else 1
        sharding = jax.typeof(x).sharding
        self._mesh, self._channel_names = sharding.mesh, sharding.spec[axes.channel]
        self._span_devices = num_groups % partitions(x, axes.channel) != 0

    def sum(self, per_channel: Array) -> Array:
        """Sums a value a channel over every group."""
        if self.size == 1:
            return per_channel
        # Not reshaped, as then all of it would go to every device that shares the group.
        if self._is_one_column:
            return jnp.conj(jnp.conj(per_channel).sum(-1, keepdims=True))
        if self._span_devices:
            per_channel = self._reshard(per_channel, None)
        groups = (*per_channel.shape[:-1], self._num_groups)
        if self._multiplies:
            grouped = per_channel.reshape(*groups, self.size)
            return _product(grouped, _first_of_two(self.size, grouped.dtype))[..., 0]
        # Conjugated in between, as pairs by blocks are: else XLA would make one sum of the two.
        # A sum along two axes, even if one has size 1, it does not merge with that over positions.
        of_lanes = per_channel.reshape(*groups, *self._lane_shape).sum((-3, -2))
        return jnp.conj(jnp.conj(of_lanes).sum(-1))

    def spread(self, per_group: Array) -> Array:
        """Gives every channel its group's value; the transpose of `sum`.

        Real values of a single group may keep one column, as they broadcast by themselves.
        """
        if self.size == 1:
            return per_group
        if self._is_one_column:
            return self._repeated(per_group) if jnp.iscomplexobj(per_group) else per_group
        if self._multiplies:
            # Padded, as zeros to be joined would lack the shardings that `jax.vmap` adds.
            one_column, zero = per_group[..., None], jnp.zeros((), per_group.dtype)
            two_columns = lax.pad(one_column, zero, [(0, 0, 0)] * per_group.ndim + [(0, 1, 0)])
            grouped = _product(two_columns, _first_of_two(self.size, per_group.dtype).T)
        else:
            lanes = (*per_group.shape, self._lane_shape[-1])
            of_lanes = jnp.conj(jnp.broadcast_to(jnp.conj(per_group)[..., None], lanes))
            channels = (*per_group.shape, *self._lane_shape)
            grouped = jnp.broadcast_to(of_lanes[..., None, None, :], channels)
        per_channel = grouped.reshape(*per_group.shape[:-1], self._num_groups * self.size)
        if self._span_devices:
            per_channel = self._reshard(per_channel, self._channel_names)
        return per_channel

    def spread_both(self, u: Array, v: Array) -> tuple[Array, Array]:
        """Gives every channel its group's two values, by one product if by any."""
        if not self._multiplies or jnp.iscomplexobj(u):
            return self.spread(u), self.spread(v)
        both = self.spread(lax.complex(u, v))
        return both.real, both.imag

    def once_a_group(self, per_group: Array) -> Array:
        """The values, computed before anything that wants them for every position.

        XLA:CPU repeats every operation where its result is wanted, except quotients and remainders.
        So they are divided by 1: XLA does not know what lies between 1 and 1.
        """
        if not self._broadcasts_on_one_cpu or jnp.iscomplexobj(per_group):
            return per_group
        ones = jnp.ones_like(per_group)
        return per_group / lax.clamp(ones, lax.stop_gradient(per_group), ones)

    def _repeated(self, of_one_group: Array) -> Array:
        # Conjugated, as pairs by blocks are: else XLA would make one sum, backward, of those over
        # channels and over positions.
        names = self._channel_names
        repeated = jnp.broadcast_to(
            jnp.conj(of_one_group),
            (*of_one_group.shape[:-1], self.size),
            out_sharding=self._sharding(of_one_group, names) if names else None,
        )
        return jnp.conj(repeated)

    def _reshard(self, values: Array, channel_names: Any) -> Array:
        return jax.sharding.reshard(values, self._sharding(values, channel_names))

    def _sharding(self, values: Array, channel_names: Any) -> NamedSharding:
        of_others = jax.typeof(values).sharding.spec[:-1]
        return NamedSharding(self._mesh, PartitionSpec(*of_others, channel_names))


def _split_into_lanes(size: int) -> tuple[int, int, int]:
    """So many channels along three axes, the last of which are the lanes."""
    lanes = math.gcd(size, LANES)
    several = math.gcd(size // lanes, MANY)
    return size // (several * lanes), several, lanes


@functools.cache
def _first_of_two(size: int, dtype: Any) -> np.ndarray:
    # A constant, not jnp.ones or the like: XLA:CPU of jaxlib 0.10 to 0.12 gets the product of a sum
    # with a matrix that it makes on the way wrong.
    return np.tile(np.array([1, 0], dtype), (size, 1))


def _product(rows: Array, matrix: np.ndarray) -> Array:
    """A matrix product of all groups' rows, each of which is summed in the same order."""
    groups = rows.shape[-2]
    more = -groups % ROWS
    if more:
        behind = [(0, 0, 0)] * (rows.ndim - 2) + [(0, more, 0), (0, 0, 0)]
        rows = lax.pad(rows, jnp.zeros((), rows.dtype), behind)
    product = jnp.matmul(rows, matrix, precision=lax.Precision.HIGHEST)
    return product[..., :groups, :] if more else product
