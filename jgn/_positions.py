"""Sums over all positions, two at a time, and the way back to the positions."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jgn._axes import Axes, divisors
from jgn._devices import automatic_devices, devices_of_a_sample, is_traced_for, partitions

# So many positions in a part keep the threads of a GPU's multiprocessor busy.
PART = 256
# With fewer, most threads would wait; with more, XLA:GPU makes parts by itself.
SMALLEST_PART, LARGEST_PART = 32, 4096
# How many sums over a part of so many channels give most multiprocessors one.
ENOUGH_SUMS, CHANNELS_OF_A_SUM = 128, 64
# Along the last spatial axis a sample skips so many positions at most before it skips along others.
# With all from one row, a row unlike the others would decide.
LAST_STRIDE = 4


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


class Positions:
    """The spatial axes of x.

    Two values a channel or a group are a pair: one array, in which they are stacked, so that what
    is computed of small arrays takes half as many kernels. XLA:GPU gives one multiprocessor the
    sums over up to 4,096 positions, of a few channels at a time, which for most inputs leaves most
    multiprocessors idle. So on a GPU, where channels are innermost, the positions are summed part
    by part first. (Of two sums that follow each other XLA would make one again; of pairs it does
    not.)
    """

    def __init__(self, x: Array, axes: Axes):
        self._shape = x.shape
        self._axes = axes
        self._may_be_shared = devices_of_a_sample(x, axes) > 1
        self.on_one_cpu = is_traced_for("cpu") and not self._may_be_shared
        self._part = _part(x, axes) if is_traced_for("gpu") else None

    @property
    def number(self) -> Any:
        """How many there are: an int, or symbolic."""
        return math.prod(self._shape[axis] for axis in self._axes.spatial)

    @property
    def are_padded(self) -> bool:
        """Whether the loop over x that sums over them has branches, for padding."""
        return False

    def count(self, mask: Array, dtype: Any) -> Array:
        """How many positions are True in a mask of x's rank, (*batch, channels)."""
        repeated = (axis for axis in self._axes.spatial if mask.shape[axis] == 1)
        repeats = math.prod(self._shape[axis] for axis in repeated)
        shape = [self._shape[axis] for axis in (*self._axes.batch, self._axes.channel)]
        # A mask may be split otherwise than x, and what is blocked for x could cut it.
        sums = self._sum_at_once if self._may_be_shared else self.of(mask).sum
        return jnp.broadcast_to(sums(mask.astype(dtype)) * repeats, shape)

    def sum(self, x: Array) -> Array:
        """Σx over all positions, (*batch, channels)."""
        return self.unpair(self.sums(x, x))[0] if self._part else self._sum_at_once(x)

    def sums(self, u: Array, v: Array) -> Array:
        """The pair of Σu and Σv over all positions, (*batch, channels)."""
        if not self._part:
            return self.pair(self._sum_at_once(u), self._sum_at_once(v))
        of_parts = self.pair(*map(self._part.sum, (u, v)))
        return of_parts.sum(range(1 + len(self._axes.batch), of_parts.ndim - 1))

    def spread(self, pair: Array) -> tuple[Array, Array]:
        """Gives every position the two values of its channel; the transpose of `sums`."""
        if not self._part:
            u, v = map(self.along, self.unpair(pair))
            return u, v  # They broadcast by themselves.
        of_parts = (2, *self._part.shape_of_sums)
        batch, last = len(self._axes.batch), len(of_parts) - 1
        pair = jnp.broadcast_to(pair, (*of_parts[: 1 + batch], of_parts[last]))
        pair = jnp.broadcast_to(jnp.expand_dims(pair, range(1 + batch, last)), of_parts)
        u, v = (self._part.spread(x).reshape(self._shape) for x in self.unpair(pair))
        return u, v

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
            return values  # Then every operation is computed once.
        return tuple(lax.optimization_barrier(_stacked(*values)))

    def of(self, x: Array) -> "Positions":
        """Those of another array with the same axes."""
        return type(self)(x, self._axes)

    def sample(self, x: Array, one_in: int, multiple_of: int = 1) -> Array:
        """At least one in so many positions of x, evenly spaced along its axes.

        Along the last of several positions they are a multiple of this number, if there are enough.
        """
        # Slices of an explicitly sharded axis must divide evenly.
        axes = [a for a in self._axes.spatial if partitions(x, a) == 1]
        if not axes:
            return x
        devices = devices_of_a_sample(x, self._axes)
        last = _last_of_several_positions(axes, x.shape)
        slices = [slice(0, size, 1) for size in x.shape]
        for axis in axes:
            size, later = x.shape[axis], 1
            if axis < last:
                later = _evenly_spaced(x.shape[last], LAST_STRIDE, devices).step
            multiple = multiple_of if axis == last else 1
            taken = _evenly_spaced(size, max(1, one_in // later), devices, multiple)
            slices[axis] = taken
            # A step that does not divide the size takes fewer than one position a step.
            known = isinstance(size, int)
            one_in = one_in * len(range(size)[taken]) // size if known else one_in // taken.step
        return lax.slice(x, *zip(*((s.start, s.stop, s.step) for s in slices), strict=True))

    def in_thirds(self, sample: Array) -> tuple["Positions", Array, int] | None:
        """A sample whose last axis of several positions is in three parts; None if it cannot be.

        The thirds are one more batch axis: which of these, is the last result.
        """
        if not self._axes.spatial:
            return None
        axis = _last_of_several_positions(self._axes.spatial, self._shape)
        size = sample.shape[axis]
        if not isinstance(size, int) or size % 3:
            return None
        shape = (*sample.shape[:axis], 3, size // 3, *sample.shape[axis + 1 :])
        axes = self._axes.split(axis)
        sample = sample.reshape(shape)
        return type(self)(sample, axes), sample, axes.batch.index(axis)

    def _sum_at_once(self, x: Array) -> Array:
        channel = sum(axis < self._axes.channel for axis in self._axes.batch)
        return jnp.moveaxis(lax.reduce_sum(x, self._axes.spatial), channel, -1)


def by_components(function: Callable[..., Any], *arrays: Array) -> Any:
    """Applies a function of real arrays to the real and to the imaginary parts."""
    if not jnp.iscomplexobj(arrays[0]):
        return function(*arrays)
    real, imag = function(*(x.real for x in arrays)), function(*(x.imag for x in arrays))
    return jax.tree.map(lax.complex, real, imag)


def _stacked(*values: Array) -> Array:
    return jnp.stack(jnp.broadcast_arrays(*values))


def _last_of_several_positions(axes: Sequence[int], shape: Sequence[int]) -> int:
    """The last of some spatial axes; one that has fewer than 3 positions only if all have."""
    several = [axis for axis in axes if not (isinstance(shape[axis], int) and shape[axis] < 3)]
    return max(several or axes)


def _evenly_spaced(size: int, one_in: int, devices: int, multiple_of: int = 1) -> slice:
    """At least one in so many of an axis; on one device, as far from one end as from the other."""
    if not isinstance(size, int):
        return slice(0, size, one_in)  # A symbolic size is not known to be small.
    if devices == 1:
        number = math.ceil(size / one_in)
        multiple = math.ceil(number / multiple_of) * multiple_of
        number = multiple if multiple <= size else number
        stride = size // number
        start = (size - 1 - (number - 1) * stride) // 2
        return slice(start, start + (number - 1) * stride + 1, stride)
    # From the first on, strides that divide what each device has move nothing between devices.
    on_each = size // math.gcd(size, devices)
    stride = max(stride for stride in divisors(on_each) if stride <= one_in)
    return slice(0, size, size if size <= one_in else stride)


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
