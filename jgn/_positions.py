"""Sums over all positions, two at a time, and the way back to the positions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jgn._axes import Axes
from jgn._devices import automatic_devices, devices_of_a_sample, is_traced_for, partitions
from jgn._sample import Side, last_of_several, sample_of


class Positions:
    """The spatial axes of x.

    Two values a channel or a group are a pair: one array, in which they are stacked, so that what
    is computed of small arrays takes half as many kernels.
    """

    def __init__(self, x: Array, axes: Axes):
        self._shape = x.shape
        self._axes = axes
        self.on_one_cpu = is_traced_for("cpu") and devices_of_a_sample(x, axes) == 1

    @property
    def number(self) -> Any:
        """How many there are: an int, or symbolic."""
        return math.prod(self._shape[axis] for axis in self._axes.spatial)

    @property
    def are_padded(self) -> bool:
        """Whether the loop over x that sums over them has branches, for padding."""
        return False

    def sum(self, x: Array) -> Array:
        """Σx over all positions, (*batch, channels)."""
        return self._sum_at_once(x)

    def sums(self, u: Array, v: Array) -> Array:
        """The pair of Σu and Σv over all positions, (*batch, channels)."""
        return self.pair(self._sum_at_once(u), self._sum_at_once(v))

    def spread(self, pair: Array) -> tuple[Array, Array]:
        """Gives every position the two values of its channel; the transpose of `sums`."""
        u, v = map(self.along, self.unpair(pair))
        return u, v  # They broadcast by themselves.

    def along(self, values: Array) -> Array:
        """Lays (*batch, channels) out along the axes of x, with ones elsewhere."""
        owners = (*self._axes.batch, self._axes.channel)
        in_order = jnp.transpose(values, sorted(range(len(owners)), key=owners.__getitem__))
        return jnp.expand_dims(in_order, self._axes.spatial)

    def pair(self, u: Array, v: Array) -> Array:
        """Two values a channel or a group as `sums` gives them."""
        return _stacked(u, v)

    def unpair(self, pair: Array) -> tuple[Array, Array]:
        """The two values of a pair."""
        return pair[0], pair[1]

    def once_a_channel(self, *values: Array) -> Sequence[Array]:
        """Values of channels, computed before anything that wants them for every position.

        XLA would compute at least some of them as often as they are wanted. They are stacked, which
        makes another array of them: XLA:GPU of jaxlib 0.11 takes the two sides of a barrier for two
        arrays, and lets a kernel write over the one while it reads the other.
        """
        if jax.config.jax_disable_jit:
            return values  # ONNX's converters, which trace so, know no barrier; none is needed.
        return tuple(lax.optimization_barrier(_stacked(*values)))

    def of(self, x: Array, axes: Axes | None = None, few: int = 1) -> "Positions":
        """Those of another array, along the same axes unless others are given.

        few: So many positions may be added one by one, if x has no gradient.
        """
        del few
        return type(self)(x, self._axes if axes is None else axes)

    def sample(self, x: Array, one_in: int, multiple_of: int = 1) -> Array:
        """At least one in so many positions of x; `sample_of` says which."""
        spatial, devices = self._axes.spatial, automatic_devices(x)
        sides = [Side(x.shape[axis], partitions(x, axis), devices) for axis in spatial]
        sample = dict(zip(spatial, sample_of(sides, one_in, multiple_of), strict=True))
        # Before those of shares, so that less travels if some must.
        slices = [slice(0, size, 1) for size in x.shape]
        for axis, taken in sample.items():
            if taken.shares == 1:
                slices[axis] = taken.of_each
        x = lax.slice(x, *zip(*((s.start, s.stop, s.step) for s in slices), strict=True))
        for axis, taken in sample.items():
            if taken.shares > 1:
                x = taken.of(x, axis)
        return x

    def in_thirds(self, sample: Array) -> tuple[Axes, Array, int] | None:
        """A sample whose last axis of several positions is in three parts; None if it cannot be.

        The thirds are one more batch axis: which of these, is the last result.
        """
        spatial = self._axes.spatial
        if not spatial:
            return None
        axis = spatial[last_of_several([self._shape[axis] for axis in spatial])]
        size = sample.shape[axis]
        if size % 3:
            return None
        shape = (*sample.shape[:axis], 3, size // 3, *sample.shape[axis + 1 :])
        axes = self._axes.split(axis)
        return axes, sample.reshape(shape), axes.batch.index(axis)

    def _sum_at_once(self, x: Array) -> Array:
        return self._channels_last(lax.reduce_sum(x, self._axes.spatial))

    def _channels_last(self, x: Array) -> Array:
        """Moves the channels of a sum behind the batch axes."""
        channel = sum(axis < self._axes.channel for axis in self._axes.batch)
        return jnp.moveaxis(x, channel, -1)


def by_components(function: Callable[..., Any], *arrays: Array) -> Any:
    """Applies a function of real arrays to the real and to the imaginary parts."""
    if not jnp.iscomplexobj(arrays[0]):
        return function(*arrays)
    real, imag = function(*(x.real for x in arrays)), function(*(x.imag for x in arrays))
    return jax.tree.map(lax.complex, real, imag)


def _stacked(*values: Array) -> Array:
    return jnp.stack(jnp.broadcast_arrays(*values))
