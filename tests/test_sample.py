"""A sample has at least as many positions as asked, from all over, and every phase of a pattern."""

import itertools
import math

import jax
import numpy as np
import pytest
from cases import random

from jgn._axes import resolve_axes
from jgn._group_norm import positions_of
from jgn._sample import Side, sample_of


def positions_in(x, channel_axis):
    return positions_of(x, resolve_axes(x.ndim, channel_axis, None), x.dtype)


@pytest.mark.parametrize("one_in", [1, 2, 64, 2**30])
@pytest.mark.parametrize(
    ("shape", "channel_axis"),
    [
        ((2, 56, 56, 8), -1),
        ((2, 8, 7, 300), 1),
        ((2, 100, 8), -1),
        ((2, 3, 5, 65, 8), -1),
        # Strides that no size is a multiple of, along several axes.
        ((2, 17, 128, 8), -1),
        ((2, 17, 43, 40, 8), -1),
    ],
)
def test_the_sample_has_one_in_so_many_positions_of_every_channel(shape, channel_axis, one_in):
    x = jax.numpy.asarray(random(shape))
    sample = positions_in(x, channel_axis).sample(x, one_in)
    positions, sampled = (math.prod(s) // (2 * 8) for s in (shape, sample.shape))
    assert sample.shape[0] == 2
    assert sample.shape[channel_axis] == 8
    assert positions / one_in <= sampled
    # Two positions at least along an axis that has several. A stride can be cut short by the size
    # of its axis, by less than half each.
    assert sampled <= max(2 ** (len(shape) - 2), 4 * positions / one_in)


@pytest.mark.parametrize("channel_axis", [-1, 1])
def test_the_sample_comes_from_all_over_but_not_from_the_borders(channel_axis):
    height, width = 56, 64
    numbered = np.arange(height * width).reshape(height, width, 1)
    image = np.moveaxis(np.broadcast_to(numbered, (2, height, width, 8)), -1, channel_axis)
    image = jax.numpy.asarray(image)
    sample = positions_in(image, channel_axis).sample(image, 64)
    for places, size in zip(
        np.unravel_index(sample, (height, width)), (height, width), strict=True
    ):
        kept = np.unique(places)
        assert len(kept) >= 4
        before, after = kept[0], size - 1 - kept[-1]
        assert before >= 1
        assert abs(before - after) <= 1


def taken_of(sizes, one_in, devices=1, multiple_of=1, partitions=1):
    sides = [Side(size, partitions, devices) for size in sizes]
    sample = sample_of(sides, one_in, multiple_of)
    return [
        np.arange(size).reshape(taken.shares, -1)[:, taken.of_each].ravel()
        for size, taken in zip(sizes, sample, strict=True)
    ]


@pytest.mark.parametrize("devices", [1, 2, 8, 12, 512])
def test_one_in_so_many_are_enough_of_every_size(devices):
    sizes = [(size,) for size in range(1, 300)]
    sizes += itertools.product(range(1, 40), repeat=2)
    sizes += itertools.product(range(1, 10), repeat=3)
    for each, one_in, multiple_of in itertools.product(sizes, (1, 6, 17, 64), (1, 3)):
        taken = taken_of(each, one_in, devices, multiple_of)
        assert math.prod(map(len, taken)) * one_in >= math.prod(each), each


@pytest.mark.parametrize("devices", [1, 2, 8, 12, 512])
def test_where_every_third_or_fewer_are_taken_none_is_at_a_border(devices):
    for size, one_in, multiple_of in itertools.product(range(5, 300), (3, 6, 17, 64), (1, 3)):
        (taken,) = taken_of((size,), one_in, devices, multiple_of)
        if len(taken) * 3 <= size:
            assert taken[0] >= 1, (size, taken)
            assert taken[-1] <= size - 2, (size, taken)


@pytest.mark.parametrize("devices", [1, 2, 8, 12, 512])
def test_no_position_decides_alone_along_an_axis_of_several(devices):
    """A row, a column or a frame may be unlike the others."""
    for sizes in itertools.product((5, 7, 8, 16, 100), repeat=3):
        for taken in taken_of(sizes, 64, devices):
            assert len(taken) >= 2, sizes


@pytest.mark.parametrize("size", [5, 7, 8, 10, 12, 14, 16, 20, 25])
def test_a_small_image_is_sampled_in_more_than_one_row_and_column(size):
    rows, columns = taken_of((size, size), 64, multiple_of=3)
    assert len(rows) >= 2
    assert len(columns) >= 3


def test_on_one_device_no_more_than_a_third_lies_beyond_it():
    for size, one_in, multiple_of in itertools.product(range(16, 300), (3, 6, 10, 64), (1, 3)):
        (taken,) = taken_of((size,), one_in, multiple_of=multiple_of)
        if len(taken) > 1:
            before, after = taken[0], size - 1 - taken[-1]
            assert before + after - (taken[1] - taken[0]) <= size / 3, (size, taken)


@pytest.mark.parametrize("devices", [2, 4, 8, 12, 512])
def test_of_a_few_positions_that_devices_may_share_not_all_are_the_sample(devices):
    for sizes in itertools.product((2, 4), repeat=2):
        assert [len(taken) for taken in taken_of(sizes, 64, devices)] == [1, 1]


@pytest.mark.parametrize("sizes", [(16, 32, 32), (32, 64, 64), (8, 64, 64), (64, 8, 32)])
def test_a_volume_is_sampled_along_every_axis(sizes):
    for size, taken in zip(sizes, taken_of(sizes, 64, multiple_of=3), strict=True):
        assert len(taken) >= min(size, 16) / 4


def test_every_phase_of_a_pattern_is_as_frequent_as_any_other():
    for size, one_in in itertools.product(range(10, 300), (5, 6, 10, 16, 33, 64)):
        (taken,) = taken_of((size,), one_in)
        if taken[1] - taken[0] < 5:
            continue  # Too near each other to leave much out.
        for period in (2, 4, 8, 16):
            frequent = np.bincount(taken % period, minlength=period)
            assert frequent.max() - frequent.min() <= 1, (size, taken, period)


@pytest.mark.parametrize("devices", [2, 4, 8, 512])
def test_no_phase_of_a_pattern_is_most_of_a_shared_sample(devices):
    for size, one_in in itertools.product(range(16, 520, 8), (6, 16, 64)):
        (taken,) = taken_of((size,), one_in, devices)
        for period in (2, 4, 8):
            assert np.bincount(taken % period).max() <= 2 / 3 * len(taken), (size, taken, period)


@pytest.mark.parametrize("devices", [4, 8, 512])
@pytest.mark.parametrize("size", [28, 56, 112])
def test_nor_of_a_pattern_that_repeats_as_often_as_a_share(size, devices):
    """A share has 14 or 28 positions, of which two or four would be at a distance of 7."""
    (taken,) = taken_of((size,), 8, devices)
    assert np.bincount(taken % 7).max() <= len(taken) / 2


@pytest.mark.parametrize(
    ("partitions", "devices"), [(1, 2), (1, 3), (1, 6), (1, 8), (2, 1), (8, 1), (12, 1), (2, 4)]
)
def test_of_what_devices_share_each_has_as_many(partitions, devices):
    """So that none travels; of a few positions that are not known to be split one may be enough."""
    for whole, one_in in itertools.product(range(1, 40), (1, 6, 17, 64)):
        size = whole * partitions * devices
        (taken,) = taken_of((size,), one_in, devices, partitions=partitions)
        owners = np.bincount(taken // whole, minlength=partitions * devices)
        if len(taken) == 1:
            assert partitions == 1
            assert size < 5
            assert owners[0] == 1, "one of another's would travel"
        else:
            assert (owners == len(taken) // (partitions * devices)).all(), (size, taken)


@pytest.mark.parametrize("devices", [2, 8, 64, 512])
@pytest.mark.parametrize(
    "sizes", [(56, 56), (28, 28), (64, 64), (128, 128), (256, 256), (16, 64, 64), (1024,)]
)
def test_on_a_mesh_of_any_size_the_sample_is_small_and_from_all_over(sizes, devices):
    taken = taken_of(sizes, 64, devices)
    assert math.prod(map(len, taken)) <= math.prod(sizes) / 32
    assert min(map(len, taken)) >= 4


@pytest.mark.parametrize("symbolic", ["n, h, 8", "n, h, w, 8", "n, 8, h, w", "n, d, h, w, 8"])
def test_of_symbolic_sizes_one_in_so_many_are_taken_evenly(symbolic):
    channel_axis = symbolic.split(", ").index("8")
    rank = symbolic.count(",") + 1
    x = jax.ShapeDtypeStruct(jax.export.symbolic_shape(symbolic), "float32")
    sampled = jax.export.export(jax.jit(lambda x: positions_in(x, channel_axis).sample(x, 64)))(x)
    for sizes in itertools.product((1, 11, 12, 64), repeat=rank - 2):
        shape = list(sizes)
        shape.insert(channel_axis - 1, 8)
        numbered = np.arange(math.prod(sizes)).reshape(sizes)
        numbered = np.broadcast_to(np.expand_dims(numbered, channel_axis - 1), shape)[None]
        sample = np.unique(sampled.call(numbered.astype(np.float32))).astype(int)
        assert len(sample) * 64 >= math.prod(sizes)
        if min(sizes) == 64:
            assert len(sample) * 32 <= math.prod(sizes)
        for place, size in zip(np.unravel_index(sample, sizes), sizes, strict=True):
            taken = np.unique(place)
            assert len(set(np.diff(taken))) <= 1
            assert abs(taken[0] - (size - 1 - taken[-1])) <= 1
