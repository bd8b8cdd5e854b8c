"""Sums over all positions, two at a time, and the way back to the positions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.sharding import AxisType, NamedSharding

from jgn._axes import Axes

# So many positions in a part keep the threads of a GPU's multiprocessor busy.
PART = 256
# With fewer, most threads would wait; with more, XLA:GPU makes parts by itself.
SMALLEST_PART, LARGEST_PART = 32, 4096
# How many sums over a part of so many channels give most multiprocessors one.
ENOUGH_SUMS, CHANNELS_OF_A_SUM = 128, 64
# Along the last spatial axis a sample skips so many positions at most before it skips along others.
# With all from one row, a row unlike the others would decide.
LAST_STRIDE = 4


class Positions:
    """The spatial axes of x.

    Two values a channel or a group are a pair: one array, in which they are stacked, so that what
    is computed of small arrays takes half as many kernels. XLA:GPU gives one multiprocessor the
    sums over up to 4,096 positions, of a few channels at a time, which for most inputs leaves most
    multiprocessors idle. So on a GPU, where channels are innermost, the positions are summed in
    parts first. (Of two sums that follow each other XLA would make one again; of pairs it does
    not.)
    """

    on_one_cpu = False

    def __init__(self, x: Array, axes: Axes):
        self._shape = x.shape
        self._axes = axes
        self._in_parts = _in_parts(x, axes) if is_on_one("gpu", x, axes) else None

    @property
    def number(self) -> int:
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
        return jnp.broadcast_to(self.of(mask).sum(mask.astype(dtype)) * repeats, shape)

    def sum(self, x: Array) -> Array:
        """Σx over all positions, (*batch, channels)."""
        return self.parts(self.sums(x, x))[0] if self._in_parts else self._sum_at_once(x)

    def sums(self, u: Array, v: Array) -> Array:
        """The pair of Σu and Σv over all positions, (*batch, channels)."""
        if not self._in_parts:
            return self.pair(self._sum_at_once(u), self._sum_at_once(v))
        return self.pair(*(self._of_parts(x).sum(-2) for x in (u, v))).sum(-2)

    def spread(self, pair: Array) -> tuple[Array, Array]:
        """Gives every position the two values of its channel; the transpose of `sums`."""
        if not self._in_parts:
            u, v = map(self.along, self.parts(pair))
            return u, v  # They broadcast by themselves.
        *batch, number, _, channels = self._in_parts
        pair = jnp.broadcast_to(pair, (2, *batch, channels))
        pair = jnp.broadcast_to(pair[..., None, :], (2, *batch, number, channels))
        u, v = (jnp.broadcast_to(x[..., None, :], self._in_parts) for x in self.parts(pair))
        return self._from_parts(u), self._from_parts(v)

    def along(self, values: Array) -> Array:
        """Lays (*batch, channels) out along the axes of x, with ones elsewhere."""
        owners = (*self._axes.batch, self._axes.channel)
        in_order = jnp.transpose(values, sorted(range(len(owners)), key=owners.__getitem__))
        return jnp.expand_dims(in_order, self._axes.spatial)

    def pair(self, u: Array, v: Array) -> Array:
        """Two values a channel or a group as `sums` gives them."""
        return _stacked(u, v)

    def parts(self, pair: Array) -> tuple[Array, Array]:
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
        axes = [a for a in self._axes.spatial if partitions(jax.typeof(x).sharding, a) == 1]
        if not axes:
            return x
        devices = _devices(x, self._axes)
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

    def in_parts(self, sample: Array, parts: int) -> tuple["Positions", Array, int] | None:
        """A sample whose last axis of several positions is in so many parts; None if it cannot be.

        The parts are one more batch axis: which of these, is the last result.
        """
        if not self._axes.spatial:
            return None
        axis = _last_of_several_positions(self._axes.spatial, self._shape)
        size = sample.shape[axis]
        if not isinstance(size, int) or size % parts:
            return None
        shape = (*sample.shape[:axis], parts, size // parts, *sample.shape[axis + 1 :])
        axes = self._axes.split(axis)
        sample = sample.reshape(shape)
        return type(self)(sample, axes), sample, axes.batch.index(axis)

    # In two steps each: one reshape of other sizes an explicitly sharded x does not take.
    def _of_parts(self, x: Array) -> Array:
        return x.reshape(*self._in_a_row).reshape(self._in_parts)

    def _from_parts(self, x: Array) -> Array:
        return x.reshape(*self._in_a_row).reshape(self._shape)

    @property
    def _in_a_row(self) -> tuple[int, ...]:
        batch = (self._shape[axis] for axis in self._axes.batch)
        return *batch, self.number, self._shape[self._axes.channel]

    def _sum_at_once(self, x: Array) -> Array:
        channel = sum(axis < self._axes.channel for axis in self._axes.batch)
        return jnp.moveaxis(x.sum(self._axes.spatial), channel, -1)


def by_parts(function: Callable[..., Any], *arrays: Array) -> Any:
    """Applies a function of real arrays to the real and to the imaginary parts."""
    if not jnp.iscomplexobj(arrays[0]):
        return function(*arrays)
    real, imag = function(*(x.real for x in arrays)), function(*(x.imag for x in arrays))
    return jax.tree.map(lax.complex, real, imag)


def _stacked(*values: Array) -> Array:
    return jnp.stack(jnp.broadcast_arrays(*values))


def is_on_one(platform: str, x: Array, axes: Axes) -> bool:
    """Whether one such device has whole samples, and is traced for several operations at a time.

    Where devices share an axis, what is summed over a part of it would travel between them.
    """
    alone = jax.default_backend() == platform and _devices(x, axes) == 1
    return alone and not jax.config.jax_disable_jit


def _devices(x: Array, axes: Axes) -> int:
    """Over how many devices a sample may extend, as far as tracing tells.

    Of explicitly typed mesh axes x tells which of its own they split, and of manual ones, as in
    `jax.shard_map` and `jax.pmap`, it is the part on one device. Others may split any axis.
    """
    sharding = jax.typeof(x).sharding
    mesh = jax.sharding.get_abstract_mesh() if sharding.mesh.empty else sharding.mesh
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True) if not mesh.empty else ()
    automatic = math.prod(size for size, kind in kinds if kind == AxisType.Auto)
    return automatic * math.prod(partitions(sharding, a) for a in (*axes.spatial, axes.channel))


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
    on_each = size // devices if size % devices == 0 else 1
    divisors = [stride for stride in range(1, one_in + 1) if on_each % stride == 0]
    return slice(0, size, size if size <= one_in else max(divisors))


def partitions(sharding: NamedSharding, axis: int) -> int:
    """Over how many devices explicitly typed mesh axes split this axis."""
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


def _in_parts(x: Array, axes: Axes) -> tuple[int, ...] | None:
    """(*batch, parts, positions of a part, channels); None where the positions stay together."""
    shape, sharding = x.shape, jax.typeof(x).sharding
    innermost = (*axes.spatial, axes.channel) == tuple(range(len(axes.batch), len(shape)))
    number = math.prod(shape[axis] for axis in axes.spatial)
    if not innermost or not isinstance(number, int):
        return None
    sizes = [n for n in range(SMALLEST_PART, LARGEST_PART + 1) if number % n == 0 and n < number]
    if not sizes:
        return None
    *batch, channels = (shape[axis] for axis in (*axes.batch, axes.channel))
    on_each = (shape[axis] // partitions(sharding, axis) for axis in axes.batch)
    known_batch = math.prod(size for size in on_each if isinstance(size, int))
    sums = known_batch * math.ceil(channels / CHANNELS_OF_A_SUM) * number
    many_enough = [size for size in sizes if sums // size >= ENOUGH_SUMS] or sizes[:1]
    size = min(many_enough, key=lambda size: max(size / PART, PART / size))
    return *batch, number // size, size, channels
