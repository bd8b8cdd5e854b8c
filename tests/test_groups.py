"""Sums over positions and groups, their way back, and the sample, each compiled alone."""

import math

import chex
import jax
import numpy as np
import pytest
from cases import EVERY_CASE, members, on_a_mesh, random
from oracle import tolerance

from jgn._axes import resolve_axes
from jgn._groups import Groups
from jgn._moments import Reduction, Shards, variance
from jgn._positions import Positions

# On a mesh a CPU sums as other backends do.
PLACED = pytest.mark.parametrize("placed", [np.asarray, on_a_mesh])


def parts_of(x, num_groups, channel_axis=-1, reduction_axes=None):
    """The positions and the groups of x."""
    axes = resolve_axes(x.ndim, channel_axis, reduction_axes)
    return Positions(x, axes), Groups(x, axes, num_groups)


@EVERY_CASE
@PLACED
def test_sums_come_back_to_every_channel_of_their_group(shape, num_groups, options, placed):
    x = placed(random(shape))
    of_group = members(shape, num_groups, **options)
    wanted = np.bincount(of_group.ravel(), np.ravel(x).astype(np.float64))[of_group]

    @jax.jit
    def sums(x):
        positions, groups = parts_of(x, num_groups, **options)
        return groups.spread(groups.sum(positions.sum(x)))

    actual = np.broadcast_to(sums(x), shape)
    atol = tolerance("float32", x.size) * np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


def test_a_sum_is_right_where_xla_gets_a_product_with_a_made_matrix_wrong():
    """In jaxlib 0.10 to 0.12, on a CPU, with x.sum(...) @ jnp.ones(...) in one program."""
    x = random((2, 64, 3, 16))

    @jax.jit
    def sums(x):
        positions, groups = parts_of(x, 4)
        return groups.spread(groups.sum(positions.sum(x)))

    wanted = x.astype(np.float64).reshape(2, 192, 4, 4).sum((1, 3))
    atol = tolerance("float32", 768) * np.abs(wanted).max()
    np.testing.assert_allclose(sums(x)[:, 0, 0, ::4], wanted, rtol=0, atol=atol)


@EVERY_CASE
@PLACED
def test_two_sums_at_once_are_those_of_each(shape, num_groups, options, placed):
    del num_groups
    u, v = placed(random(shape)), random(shape, 1)
    axes = resolve_axes(u.ndim, **{"channel_axis": -1, "reduction_axes": None, **options})

    @jax.jit
    def sums(u, v):
        positions = Positions(u, axes)
        return positions.parts(positions.sums(u, v))

    actual = sums(u, v)
    for total, values in zip(actual, (u, v), strict=True):
        wanted = np.asarray(values, np.float64).sum(axes.spatial, keepdims=True)
        atol = tolerance("float32", u.size) * np.abs(wanted).max()
        np.testing.assert_allclose(total, wanted, rtol=0, atol=atol)


@EVERY_CASE
@PLACED
def test_spreading_is_the_transpose_of_the_two_sums(shape, num_groups, options, placed):
    del num_groups
    x = placed(random(shape))
    axes = resolve_axes(x.ndim, **{"channel_axis": -1, "reduction_axes": None, **options})
    per_channel = [1 if axis in axes.spatial else size for axis, size in enumerate(shape)]
    a, b = random(per_channel, 1), random(per_channel, 2)

    @jax.jit
    def spread_and_transpose(x, a, b):
        def spread(a, b):
            positions = Positions(x, axes)
            spread = positions.spread(positions.pair(a, b))
            return [jax.numpy.broadcast_to(c, x.shape) for c in spread]

        values, transpose = jax.vjp(spread, a, b)
        return values, transpose([x, 2 * x])

    values, transposed = spread_and_transpose(x, a, b)
    chex.assert_trees_all_equal(values, [np.broadcast_to(c, shape) for c in (a, b)])
    wanted = np.asarray(x, np.float64).sum(axes.spatial, keepdims=True)
    atol = tolerance("float32", x.size) * np.abs(wanted).max()
    np.testing.assert_allclose(transposed[0], wanted, rtol=0, atol=atol)
    np.testing.assert_allclose(transposed[1], 2 * wanted, rtol=0, atol=2 * atol)


@EVERY_CASE
def test_the_count_is_that_of_the_mask(shape, num_groups, options):
    x, mask = random(shape), np.random.default_rng(0).random(shape) < 0.5
    of_group = members(shape, num_groups, **options)
    wanted = np.bincount(of_group.ravel(), mask.ravel())[of_group]
    _, groups = parts_of(jax.numpy.asarray(x), num_groups, **options)
    counted = groups.spread(groups.count(jax.numpy.asarray(x), jax.numpy.asarray(mask)))
    np.testing.assert_array_equal(np.broadcast_to(counted, shape), wanted)
    assert int(groups.count(jax.numpy.asarray(x), None)) == np.bincount(of_group.ravel())[0]


@pytest.mark.parametrize("one_in", [1, 2, 64, 2**30])
@pytest.mark.parametrize(
    ("shape", "channel_axis"),
    [((2, 56, 56, 8), -1), ((2, 8, 7, 300), 1), ((2, 100, 8), -1), ((2, 3, 5, 65, 8), -1)],
)
def test_the_sample_has_one_in_so_many_positions_of_every_channel(shape, channel_axis, one_in):
    x = jax.numpy.asarray(random(shape))
    sample = parts_of(x, 4, channel_axis)[0].sample(x, one_in)
    positions, sampled = (math.prod(s) // (2 * 8) for s in (shape, sample.shape))
    assert sample.shape[0] == 2
    assert sample.shape[channel_axis] == 8
    assert positions / one_in <= sampled
    if one_in > positions:
        assert sampled == 1
    # A stride can be cut short by the size of its axis, by less than half each.
    assert sampled <= max(1, 4 * positions / one_in)


@pytest.mark.parametrize(("shape", "num_groups"), [((500, 5, 8, 8), 8), ((500, 9, 40), 10)])
def test_k_lies_near_the_mean_of_small_groups_too(shape, num_groups):
    """Within 4.5 standard deviations of the mean of 32 elements."""
    x = random(shape, mean=0, deviation=1)
    positions, groups = parts_of(x, num_groups)
    k = Reduction(positions, groups, None, Shards(None, None)).near_mean(jax.numpy.asarray(x))
    assert np.abs(k).max() <= 4.5 / math.sqrt(32)


def test_k_is_no_further_from_the_mean_than_a_sample_of_one_in_64_can_be():
    """With an outlier in the first position of a large group, which every sample has."""
    x = random((1, 64, 128, 8), mean=0, deviation=1)
    x[:, 0, 0] = 1e5
    positions, groups = parts_of(x, 1)
    k = Reduction(positions, groups, None, Shards(None, None)).near_mean(jax.numpy.asarray(x))
    wide = x.astype(np.float64)
    assert (float(k.item()) - wide.mean()) ** 2 <= 64 * wide.var()


def test_a_variance_that_rounding_puts_below_0_is_0():
    """Σd²/n = 1 − 2⁻²⁴, (Σd/n)² = 1."""
    sum_d, sum_d2 = np.float32(2), np.nextafter(np.float32(2), np.float32(0))
    assert sum_d2 / 2 - (sum_d / 2) ** 2 < 0
    assert variance(np.float32(2), sum_d, sum_d2) == 0
