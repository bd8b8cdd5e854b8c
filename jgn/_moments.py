"""Shifted moments of every group: the mean and the variance of x around a pivot k.

With d = x − k, every k gives the same moments,

    μ = k + m,    m = E[d],    σ² = E[|d|²] − |m|²,

and decides only how they are rounded: the relative error of σ² is about u · (1 + (k − μ)²/σ²),
u being the unit roundoff. Here k is the mean of at least one in `STRIDE` of the group's elements,
and the mean of s out of n numbers is never further from their mean than (k − μ)² ≤ (n/s) · σ²
(Cauchy-Schwarz). So no input whatever makes that error larger than (1 + STRIDE) · u. The textbook's
E[x²] − E[x]² is the same with k = 0, and has no bound.

Arrays come in three shapes: that of x; one value a channel, of x's rank with ones for the spatial
axes; and one value a group, which `Groups` makes from the second and turns back into it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding, PartitionSpec

from jgn._axes import Axes

# One position in so many decides the pivot: 2 % of a pass over x, and an error of at most 65 u.
STRIDE = 64

# The name of what autodiff keeps for the backward pass besides x: a few numbers a group.
RESIDUAL = "group_norm_moments"


class Moments(NamedTuple):
    """The pivot k of every channel, and m = E[x − k] and σ² of every group."""

    pivot: Array
    mean: Array
    variance: Array


class Groups:
    """Combines the channels of each group, and spreads one value a group over its channels.

    The sum and the spreading are products with a matrix of two columns, ones and zeros, which put
    each group's value in the first of two places. XLA:CPU would fuse a plain broadcast, which is
    also the transpose of a plain sum, into the loop over x: an integer division of the channel
    index for each element, dearer than the rest of the loop. It fuses no product of inner size 2.
    """

    def __init__(self, x: Array, channel_axis: int, num_groups: int):
        self._channel_axis = channel_axis
        self._num_groups = num_groups
        self.group_size = x.shape[channel_axis] // num_groups
        sharding = jax.typeof(x).sharding
        self._channel_sharding = sharding.spec[channel_axis]
        self._span_devices = num_groups % _partitions(sharding, channel_axis) != 0
        # A literal: after a sum, XLA:CPU of jaxlib 0.10 to 0.12 gets the product with a matrix that
        # it makes on the way, jnp.ones for example, wrong.
        self._first_place = np.tile(np.array([1.0, 0.0]), (self.group_size, 1))

    def sum(self, per_channel: Array) -> Array:
        return _matmul(self._split(per_channel), self._first_place)

    def max(self, per_channel: Array) -> Array:
        largest = self._split(per_channel).max(axis=-1, keepdims=True)
        return jnp.pad(largest, [(0, 0)] * (largest.ndim - 1) + [(0, 1)])

    def spread(self, per_group: Array) -> Array:
        return self._join(_matmul(per_group, self._first_place.T))

    def _split(self, per_channel: Array) -> Array:
        last = jnp.moveaxis(per_channel, self._channel_axis, -1)
        if self._span_devices:
            last = _reshard_last(last, None)
        return last.reshape(*last.shape[:-1], self._num_groups, self.group_size)

    def _join(self, grouped: Array) -> Array:
        last = grouped.reshape(*grouped.shape[:-2], self._num_groups * self.group_size)
        if self._span_devices:
            last = _reshard_last(last, self._channel_sharding)
        return jnp.moveaxis(last, -1, self._channel_axis)


def _partitions(sharding: NamedSharding, axis: int) -> int:
    """Over how many devices explicitly typed mesh axes split this axis."""
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


def _reshard_last(x: Array, sharding: str | tuple[str, ...] | None) -> Array:
    spec = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, PartitionSpec(*spec[:-1], sharding))


class Shards(NamedTuple):
    """The mapped axes, if any, over which groups extend."""

    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None

    def sum(self, values: tuple[Array, ...]) -> tuple[Array, ...]:
        if self.axis_name is None:
            return values
        return lax.psum(values, self.axis_name, axis_index_groups=self.axis_index_groups)

    def max(self, value: Array) -> Array:
        if self.axis_name is None:
            return value
        return lax.pmax(value, self.axis_name, axis_index_groups=self.axis_index_groups)


def moments(x: Array, axes: Axes, groups: Groups, mask: Array | None, shards: Shards) -> Moments:
    """Moments of every group of x, over all shards, counting the elements where mask is True."""
    # The identity holds for every k, so stopping its gradient changes no derivative of any order.
    k = _pivot(lax.stop_gradient(x), axes, groups, mask, shards)
    k = groups.spread(checkpoint_name(k, RESIDUAL))
    # Equal differences x − k become one array in memory as soon as several passes read them. Copies
    # behind a barrier count as different, so that each pass subtracts its own on the way.
    k_of_mean, k_of_variance, k_of_output = lax.optimization_barrier((k, k, k))

    def total(elements: Array) -> Array:
        counted = elements if mask is None else jnp.where(mask, elements, 0)
        return groups.sum(counted.sum(axes.spatial, keepdims=True))

    n, sum_d, sum_d2 = shards.sum(
        (
            _count(x, axes, groups, mask),
            total(x - k_of_mean),
            total(_squared_magnitude(x - k_of_variance)),
        )
    )
    n = jnp.maximum(n, 1)
    mean = checkpoint_name(sum_d / n, RESIDUAL)
    mean_square = checkpoint_name(sum_d2 / n, RESIDUAL)
    variance = mean_square - _squared_magnitude(mean)
    # Rounding can put σ² = 0 just below 0. A maximum would halve the derivative at exactly 0.
    return Moments(k_of_output, mean, jnp.where(variance < 0, 0, variance))


def _pivot(x: Array, axes: Axes, groups: Groups, mask: Array | None, shards: Shards) -> Array:
    """The mean of a sample of every group, or of all that the mask counts: one value a group.

    It is taken around the sample's largest element, which makes it exact where all are equal: in a
    constant group d = 0.
    """
    sample = _one_in(STRIDE, x, axes.spatial) if mask is None else x
    n = _count(sample, axes, groups, mask)

    def largest(part: Array) -> Array:
        counted = part if mask is None else jnp.where(mask, part, -jnp.inf)
        return groups.max(counted.max(axes.spatial, keepdims=True))

    anchor = jnp.where(n == 0, 0, _by_parts(largest, sample))
    beyond = sample - groups.spread(anchor)
    counted = beyond if mask is None else jnp.where(mask, beyond, 0)
    k = anchor + groups.sum(counted.sum(axes.spatial, keepdims=True)) / jnp.maximum(n, 1)

    def one_for_all_shards(part: Array) -> Array:
        chosen = shards.max(jnp.where(n == 0, -jnp.inf, part))
        return jnp.where(chosen == -jnp.inf, 0, chosen)

    return k if shards.axis_name is None else _by_parts(one_for_all_shards, k)


def _one_in(stride: int, x: Array, spatial: tuple[int, ...]) -> Array:
    """At least one in `stride` of the positions, skipping along the first spatial axes."""
    strides = [1] * x.ndim
    for axis in spatial:
        size = x.shape[axis]
        if _partitions(jax.typeof(x).sharding, axis) > 1:
            continue  # Slices of an explicitly sharded axis must divide evenly.
        # A symbolic size is not known to be small.
        strides[axis] = min(stride, size) if isinstance(size, int) else stride
        stride //= strides[axis]
    return lax.slice(x, (0,) * x.ndim, x.shape, strides)


def _count(x: Array, axes: Axes, groups: Groups, mask: Array | None) -> Array:
    """How many elements of x count in a group: one number, or with a mask one value a group."""
    real = jnp.finfo(x.dtype).dtype
    if mask is None:
        positions = math.prod(x.shape[axis] for axis in axes.spatial)
        return jnp.asarray(positions * groups.group_size, real)
    repeats = math.prod(x.shape[axis] for axis in axes.spatial if mask.shape[axis] == 1)
    counted = mask.astype(real).sum(axes.spatial, keepdims=True) * repeats
    per_channel = [1 if axis in axes.spatial else size for axis, size in enumerate(x.shape)]
    return groups.sum(jnp.broadcast_to(counted, per_channel))


def _squared_magnitude(d: Array) -> Array:
    if jnp.iscomplexobj(d):
        return jnp.square(d.real) + jnp.square(d.imag)
    return jnp.square(d)


def _by_parts(function: Callable[[Array], Array], x: Array) -> Array:
    """Applies a function of real arrays to the real and the imaginary part of x."""
    if jnp.iscomplexobj(x):
        return lax.complex(function(x.real), function(x.imag))
    return function(x)


def _matmul(a: Array, b: np.ndarray) -> Array:
    dimensions = (((a.ndim - 1,), (0,)), ((), ()))
    b = jnp.asarray(b, a.dtype)
    return lax.dot_general(a, b, dimensions, precision=lax.Precision.HIGHEST)
