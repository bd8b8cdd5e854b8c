"""Sums over positions and groups, their way back, and the shifts, each compiled alone."""

import math

import chex
import jax
import numpy as np
import pytest
from cases import EVERY_CASE, members, on_a_mesh, random
from jax import export
from oracle import tolerance, unit_roundoff

from jgn._axes import resolve_axes
from jgn._group_norm import positions_of
from jgn._groups import Groups
from jgn._moments import Reduction, Shards, is_constant, mean

# On a mesh each device has whole blocks, and the sample has no thirds.
PLACED = pytest.mark.parametrize("placed", [np.asarray, on_a_mesh])


def parts_of(x, num_groups, channel_axis=-1, reduction_axes=None):
    """The positions and the groups of x."""
    axes = resolve_axes(x.ndim, channel_axis, reduction_axes)
    positions = positions_of(x, axes, x.dtype)
    return positions, Groups(x, axes, num_groups, positions)


@EVERY_CASE
@PLACED
def test_sums_come_back_to_every_channel_of_their_group(shape, num_groups, options, placed):
    x = placed(random(shape))
    of_group = members(shape, num_groups, **options)
    wanted = np.bincount(of_group.ravel(), np.ravel(x).astype(np.float64))[of_group]

    @jax.jit
    def sums(x):
        positions, groups = parts_of(x, num_groups, **options)
        return positions.along(groups.spread(groups.sum(positions.sum(x))))

    actual = np.broadcast_to(sums(x), shape)
    atol = tolerance("float32", x.size) * np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(2, 400, 6), (2, 8, 12, 24), (2, 3, 64, 4)])
def test_parts_have_the_same_sums_and_their_transpose(shape, traced_for):
    """The form of GPUs, whichever device runs it."""
    traced_for("gpu")
    u, v, (a, b) = random(shape), random(shape, 1), random((2, shape[0], shape[-1]), 2)
    positions = parts_of(u, 2)[0]
    assert positions._part, "else this tests plain sums"

    @jax.jit
    def sums_and_transpose(u, v, a, b):
        both, transpose = jax.vjp(lambda a, b: positions.spread(positions.pair(a, b)), a, b)
        return positions.unpair(positions.sums(u, v)), both, transpose((u, v))

    sums, spread, transposed = sums_and_transpose(u, v, a, b)
    for per_channel, everywhere in zip((a, b), spread, strict=True):
        np.testing.assert_array_equal(
            everywhere, np.broadcast_to(positions.along(per_channel), shape)
        )
    for x, *totals in zip((u, v), sums, transposed, strict=True):
        wanted = x.astype(np.float64).sum(tuple(range(1, x.ndim - 1)))
        atol = tolerance("float32", x.size) * np.abs(wanted).max()
        for total in totals:
            np.testing.assert_allclose(total, wanted, rtol=0, atol=atol)


def test_a_sum_is_right_where_xla_gets_a_product_with_a_made_matrix_wrong():
    """In jaxlib 0.10 to 0.12, on a CPU, with x.sum(...) @ jnp.ones(...) in one program."""
    x = random((2, 64, 3, 16))

    @jax.jit
    def sums(x):
        positions, groups = parts_of(x, 4)
        return groups.spread(groups.sum(positions.sum(x)))

    wanted = x.astype(np.float64).reshape(2, 192, 4, 4).sum((1, 3))
    atol = tolerance("float32", 768) * np.abs(wanted).max()
    np.testing.assert_allclose(sums(x)[:, ::4], wanted, rtol=0, atol=atol)


@EVERY_CASE
@PLACED
def test_two_sums_at_once_are_those_of_each(shape, num_groups, options, placed):
    del num_groups
    u, v = placed(random(shape)), random(shape, 1)
    axes = resolve_axes(u.ndim, **{"channel_axis": -1, "reduction_axes": None, **options})

    @jax.jit
    def sums(u, v):
        positions = positions_of(u, axes, u.dtype)
        # On a mesh nothing is added one by one.
        return [
            [positions.along(total) for total in way.unpair(way.sums(u, v))]
            for way in (positions, positions.of(u, few=8 if placed is np.asarray else 1))
        ]

    for actual in sums(u, v):
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
    per_channel = [shape[axis] for axis in (*axes.batch, axes.channel)]
    a, b = random(per_channel, 1), random(per_channel, 2)
    positions = positions_of(x, axes, x.dtype)

    @jax.jit
    def spread_and_transpose(x, a, b):
        def spread(a, b):
            spread = positions.spread(positions.pair(a, b))
            return [jax.numpy.broadcast_to(c, x.shape) for c in spread]

        values, transpose = jax.vjp(spread, a, b)
        return values, transpose([x, 2 * x])

    values, transposed = spread_and_transpose(x, a, b)
    laid_out = [np.broadcast_to(positions.along(c), shape) for c in (a, b)]
    chex.assert_trees_all_equal(values, laid_out)
    wanted = np.asarray(x, np.float64).sum(axes.spatial, keepdims=True)
    atol = tolerance("float32", x.size) * np.abs(wanted).max()
    for factor, total in zip((1, 2), map(positions.along, transposed), strict=True):
        np.testing.assert_allclose(total, factor * wanted, rtol=0, atol=factor * atol)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere there are no blocks")
@pytest.mark.parametrize(
    ("sizes", "channel_axis", "wanted"),
    [
        ("n, h, w, 8", -1, {1: {8}, 2: {8}}),
        ("n, h, 48, 8", -1, {1: {8}, 2: {16, 3}}),  # First those that need no padding.
        ("n, t, 1, 8", -1, {1: {8}}),
        ("n, 8, h, w", 1, {2: {8}}),  # Of the width, neighbours in memory, there may be few.
        ("n, 8, 1, t", 1, {3: {8}}),
    ],
)
def test_blocks_of_symbolic_sizes(sizes, channel_axis, wanted):
    x = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), "float32")
    found = []
    jax.eval_shape(lambda x: found.extend(parts_of(x, 4, channel_axis)[0]._blocks), x)
    of_axes = {axis: {block.size for block in found if block.axis == axis} for axis in wanted}
    assert of_axes == wanted
    assert {block.axis for block in found} == set(wanted)
    assert math.prod(block.size for block in found) >= 4096


@pytest.mark.parametrize("channels", [32, 33, 37, 40, 64, 74, 512, 1200])
@pytest.mark.parametrize("num_groups", [1, 3])
@PLACED
def test_large_groups_sum_all_of_their_channels(channels, num_groups, placed):
    x = placed(random((4, num_groups * channels, 3)))

    @jax.jit
    def sums_and_transpose(x, per_group):
        groups = parts_of(x, num_groups, channel_axis=1)[1]

        def spread(per_group):
            return jax.numpy.broadcast_to(groups.spread(per_group), x.shape[:2])

        values, transpose = jax.vjp(spread, per_group)
        return groups.sum(x[..., 0]), values, transpose(values)[0]

    per_group = random((4, num_groups), 1)
    total, spread, transposed = sums_and_transpose(x, per_group)
    wanted = np.asarray(x, np.float64)[..., 0].reshape(4, num_groups, channels).sum(-1)
    atol = tolerance("float32", channels) * np.abs(wanted).max()
    np.testing.assert_allclose(total, wanted, rtol=0, atol=atol)
    np.testing.assert_array_equal(spread, np.repeat(per_group, channels, axis=1))
    np.testing.assert_allclose(transposed, channels * per_group, rtol=1e-5)


@EVERY_CASE
def test_the_count_is_that_of_the_mask(shape, num_groups, options):
    x, mask = random(shape), np.random.default_rng(0).random(shape) < 0.5
    of_group = members(shape, num_groups, **options)
    wanted = np.bincount(of_group.ravel(), mask.ravel())[of_group]
    positions, groups = parts_of(x, num_groups, **options)

    def number(mask):
        reduction = Reduction(positions, groups, mask, Shards(None, None))
        return reduction.shifts(jax.numpy.asarray(x))[2]

    masked = groups.spread(number(jax.numpy.asarray(mask)))
    counted = np.broadcast_to(positions.along(masked), shape)
    np.testing.assert_array_equal(counted, np.maximum(wanted, 1))
    assert float(number(None)) == np.bincount(of_group.ravel())[0]


@pytest.mark.parametrize(("shape", "num_groups"), [((500, 5, 8, 8), 8), ((500, 9, 40), 10)])
def test_k_lies_near_the_mean_of_small_groups_too(shape, num_groups):
    """Within 4.5 standard deviations of the mean of 32 elements."""
    x = random(shape, mean=0, deviation=1)
    positions, groups = parts_of(x, num_groups)
    k, _, _ = Reduction(positions, groups, None, Shards(None, None)).shifts(jax.numpy.asarray(x))
    assert np.abs(k).max() <= 4.5 / math.sqrt(32)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere k is the sample's mean")
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("spatial", [(20, 20), (33, 8), (300,)])
def test_one_element_decides_neither_k_nor_q(spatial, dtype):
    """Wherever it is; all others are 0."""
    places = math.prod(spatial)
    x = np.zeros((places, places, 8), dtype)
    x[range(places), range(places), ::4] = 1e6
    x = jax.numpy.asarray(x.reshape(places, *spatial, 8))
    k, q, _ = Reduction(*parts_of(x, 2), None, Shards(None, None)).shifts(x)
    np.testing.assert_array_equal(k, 0)
    np.testing.assert_array_equal(q, 0)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="elsewhere the sample has no thirds")
@pytest.mark.parametrize("one_in", [64, 2048])
@pytest.mark.parametrize("thirds", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 64, 128, 8), (1, 17, 43, 40, 8), (1, 8191, 8)])
def test_k_is_no_further_from_the_mean_than_two_thirds_of_a_sample_of_one_in_64_can_be(
    shape, thirds, one_in
):
    """With outliers where so many thirds of a sample would be; a single third decides nothing."""
    x = random(shape, mean=0, deviation=1)
    positions, groups = parts_of(x, 1)
    numbers = jax.numpy.arange(x.size).reshape(shape)
    sample = positions.sample(numbers, one_in, multiple_of=3)
    parts = positions.in_thirds(sample)[1]
    x.flat[np.moveaxis(parts, -3, 0)[:thirds]] = 1e5
    k, q, _ = Reduction(positions, groups, None, Shards(None, None)).shifts(jax.numpy.asarray(x))
    wide = x.astype(np.float64)
    far = (float(k.item()) - wide.mean()) ** 2 / wide.var()
    assert far <= {1: 0.1, 2: 96, 3: 64}[thirds]
    assert float(q.item()) <= {1: 1, 2: 1, 3: 64}[thirds] * wide.var()


def test_a_variance_that_is_only_rounding_is_that_of_equal_elements():
    """E[d²] = 1 ± 2⁻²⁴, E[d] = 1; and what no equal elements have, with a mean 8 σ from k."""
    m = np.float32(1)
    for towards in (0, 2):
        assert is_constant(m, np.nextafter(m, np.float32(towards)) - m)
    assert not is_constant(m, np.float32(1 / 64))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other devices sum in trees")
@pytest.mark.parametrize(("ratio", "bound"), [(0, 1), (3, 1), (30, 1), (1e3, 3), (1e5, 3)])
@pytest.mark.parametrize("shape", [(64, 5, 31, 16), (64, 7, 7, 512), (64, 32, 64)])
def test_the_variance_rounds_like_few_sums_of_many(shape, ratio, bound):
    """Root mean square of its relative error, in unit roundoffs.

    Seen: 0.5 to 0.7, which is a rounding or two, and 1.3 to 2.4 where the squares have no shift.
    """
    x = random(shape, mean=ratio, deviation=1)

    @jax.jit
    def sigma_squared(x):
        reduction = Reduction(*parts_of(x, 8), None, Shards(None, None))
        return reduction.moments(x, *reduction.shifts(x))[1]

    wanted = x.astype(np.float64).reshape(64, -1, 8, shape[-1] // 8).var((1, 3))
    errors = (np.float64(sigma_squared(x)) - wanted) / wanted
    assert np.sqrt(np.square(errors).mean()) <= bound * unit_roundoff("float32")


@pytest.mark.parametrize(("mean_", "pivot"), [(0.45, 0), (-0.45, 0), (0.55, 0.55), (-1e6, -1e6)])
def test_the_pivot_is_0_within_half_a_standard_deviation_of_0_else_the_mean(mean_, pivot):
    k, variance = np.float32(mean_ + 0.25), np.float32(1)
    m = np.float32(np.float64(np.float32(mean_)) - k)
    first, rest = mean(k, m, variance)
    assert first == np.float32(pivot)
    assert np.float64(first) + np.float64(rest) == np.float64(k) + np.float64(m)


def test_the_pivot_of_equal_elements_is_their_value_however_small():
    first, rest = mean(np.float32(1e-3), np.float32(0), np.float32(0))
    assert (first, rest) == (np.float32(1e-3), 0)


@pytest.mark.parametrize("channels", [40, 64, 74, 96, 512, 1024])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_a_sum_over_many_channels_loses_few_digits(channels, num_groups):
    """As one long sum that of two sums at once was 15 units in the last place off at 512."""
    x = np.abs(random((256, num_groups * channels, 1)))
    groups = parts_of(x, num_groups, channel_axis=1)[1]
    total = jax.jit(lambda x: groups.sum(jax.lax.complex(x, x)).real)(x[..., 0])
    wanted = x.astype(np.float64).reshape(256, num_groups, channels).sum(-1)
    assert (np.abs(total - wanted) / np.spacing(np.float32(wanted))).max() <= 6
