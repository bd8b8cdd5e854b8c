"""The shapes, groups, axes and numbers with which values and derivatives are compared."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import jgn
from jgn._axes import resolve_axes

# Rank 1 has no batch axis; an axis in the middle of reduction_axes is one of the batch.
CASES = [
    ((12,), 3, {"channel_axis": 0}),
    ((4, 12), 3, {}),
    ((3, 7, 12), 4, {}),
    *(((3, 5, 4, 12), num_groups, {}) for num_groups in (1, 2, 3, 4, 6, 12)),
    ((2, 3, 2, 5, 12), 2, {}),
    ((2, 3, 2, 2, 3, 12), 2, {}),
    ((3, 12), 12, {}),
    ((2, 12, 5, 3), 4, {"channel_axis": 1}),
    ((2, 5, 12, 3), 12, {"channel_axis": -2}),
    ((12, 5, 4, 3), 6, {"channel_axis": 0}),
    ((2, 3, 5, 12), 3, {"reduction_axes": (2, 3)}),
    ((2, 3, 5, 12), 3, {"reduction_axes": (-1, 1)}),
    ((3, 5, 4, 12), 2, {"reduction_axes": (0, 1, 2, 3)}),
    ((3, 5, 12), 2, {"reduction_axes": -1}),
    ((5, 12, 3, 4), 6, {"channel_axis": -3, "reduction_axes": [0, 1]}),
    ((12, 3, 5), 3, {"channel_axis": 0, "reduction_axes": (0, 2)}),
    # Blocks of blocks, and neighbours in memory that are positions: blocks of every 16th.
    ((2, 400, 6), 3, {}),
    ((2, 6, 160), 3, {"channel_axis": 1}),
    ((2, 6, 40, 640), 3, {"channel_axis": 1}),
    # Groups of a multiple of 8 channels: in blocks, in blocks of blocks, and in 2 blocks of 12, the
    # last of which lacks one.
    ((2, 5, 4, 24), 3, {}),
    ((2, 400, 32), 2, {}),
    ((3, 23, 16), 2, {}),
    # Such blocks of such blocks; of one group; of every 16th position.
    ((2, 31, 23, 6), 3, {}),
    ((3, 37, 12), 1, {}),
    ((2, 4, 6, 131), 2, {"channel_axis": 1, "reduction_axes": (1, 3)}),
]

EVERY_CASE = pytest.mark.parametrize(
    ("shape", "num_groups", "options"),
    [
        pytest.param(*case, id="-".join(str(part) for part in case).replace(" ", ""))
        for case in CASES
    ],
)


def batch_shape(shape, channel_axis=-1, reduction_axes=None):
    """The sizes of the batch axes, in x's order."""
    if reduction_axes is None:
        return () if channel_axis % len(shape) == 0 else shape[:1]
    reduced = [reduction_axes] if isinstance(reduction_axes, int) else reduction_axes
    kept = set(range(len(shape))) - {axis % len(shape) for axis in reduced}
    return tuple(shape[axis] for axis in sorted(kept))


def members(shape, num_groups, channel_axis=-1, reduction_axes=None):
    """The number of its own group for every element of x."""
    axes = resolve_axes(len(shape), channel_axis, reduction_axes)
    size = shape[axes.channel] // num_groups
    coordinates = np.indices(shape)
    coordinates[axes.channel] //= size
    kept = [*axes.batch, axes.channel]
    return np.ravel_multi_index([coordinates[axis] for axis in kept], [shape[a] for a in kept])


def random(shape, seed=0, mean=1.0, deviation=2.0, dtype="float32"):
    values = np.random.default_rng(seed).normal(mean, deviation, shape)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        values = values + 1j * np.random.default_rng(seed + 100).normal(5, deviation / 4, shape)
    return values.astype(jnp.dtype(dtype))


def value_and_gradient_of(num_groups, **options):
    """A compiled function of x and a cotangent of y, which gives y and the gradient of x."""

    @jax.jit
    def value_and_gradient(x, cotangent):
        y, vjp = jax.vjp(lambda x: jgn.group_norm(x, num_groups, **options), x)
        return y, vjp(cotangent)[0]

    return value_and_gradient


def on_a_mesh(x):
    """x on two devices, where there are; as far as tracing tells, they may split any axis."""
    devices = jax.devices()[:2]
    axis_types = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ("a",), axis_types, devices=devices)
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec()))
