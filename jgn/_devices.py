"""What tracing tells of the devices that x is on."""

import math
from collections.abc import Sequence

import jax
from jax import Array, lax
from jax.sharding import AxisType, PartitionSpec

from jgn._axes import Axes


def is_traced_for(platform: str) -> bool:
    """Whether this is JAX's default backend, and several operations are traced at a time."""
    return jax.default_backend() == platform and not jax.config.jax_disable_jit


def devices_of_a_sample(x: Array, axes: Axes) -> int:
    """Over how many devices a sample may extend, as far as tracing tells."""
    known = math.prod(partitions(x, axis) for axis in (*axes.spatial, axes.channel))
    return known * automatic_devices(x)


def devices_of_an_axis(x: Array, axis: int) -> int:
    """Over how many devices this axis may extend, as far as tracing tells."""
    return partitions(x, axis) * automatic_devices(x)


def automatic_devices(x: Array) -> int:
    """How many devices may split any axis of x.

    Explicitly typed mesh axes split those that x itself names. And along manual ones, as in
    `jax.shard_map` and `jax.pmap`, x is no more than what one device has.
    """
    mesh = jax.typeof(x).sharding.mesh
    mesh = jax.sharding.get_abstract_mesh() if mesh.empty else mesh
    kinds = zip(mesh.axis_sizes, mesh.axis_types, strict=True)
    return math.prod(size for size, kind in kinds if kind == AxisType.Auto)


def partitions(x: Array, axis: int) -> int:
    """Over how many devices explicitly typed mesh axes split this axis."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    names = (names,) if isinstance(names, str) else names
    return math.prod(sharding.mesh.shape[name] for name in names)


def split_as(x: Array, axes: Sequence[int], values: Array) -> Array:
    """The values, whose axes are these of x, on the devices of x where explicit meshes tell."""
    of_x, of_values = jax.typeof(x).sharding, jax.typeof(values).sharding
    sizes = zip(axes, values.shape, strict=True)
    wanted = PartitionSpec(*(of_x.spec[axis] if size != 1 else None for axis, size in sizes))
    # Values that lie nowhere in particular JAX splits where they meet x.
    if any(of_values.spec) and of_values.spec != wanted:
        return jax.sharding.reshard(values, of_values.update(spec=wanted))
    return values


def varying_as(x: Array, values: Array) -> Array:
    """The values, for all devices among which x may differ, as `jax.shard_map` keeps account."""
    of_x, of_values = (jax.typeof(array).manual_axis_type.varying for array in (x, values))
    more = tuple(of_x - of_values)
    return lax.pcast(values, more, to="varying")
