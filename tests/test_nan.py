"""A NaN or an infinity reaches its own sample's own group, forward and backward, and no further."""

import functools

import jax
import numpy as np
import pytest
from cases import on_a_mesh, random

import jgn

SHAPE, GROUPS = (3, 6, 5, 12), 4
SCALE, BIAS, COTANGENT = random((12,), 1), random((12,), 2), random(SHAPE, 3)
OPTIONS = {
    "plain": {},
    "silu": {"activation": jax.nn.silu},
    "mask": {"mask": np.arange(6).reshape(1, 6, 1, 1) < 5},
    "a group a channel": {"num_groups": 12},
    "one group": {"num_groups": 1},
}


@functools.partial(jax.jit, static_argnames="name")
def value_and_gradient(x, cotangent, name):
    options = {"num_groups": GROUPS, **OPTIONS[name]}
    y, vjp = jax.vjp(lambda x: jgn.group_norm(x, scale=SCALE, bias=BIAS, **options), x)
    return y, vjp(cotangent)[0]


# The first element of all, which a pivot may come from; one in the middle; the last that counts.
@pytest.mark.parametrize("place", [(0, 0, 0, 0), (1, 3, 2, 7), (2, 4, 4, 11)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_not_finite_stays_in_its_sample_and_group(name, value, place):
    x = random(SHAPE)
    clean = jax.device_get(value_and_gradient(x, COTANGENT, name))
    x[place] = value
    y, gradient = value_and_gradient(x, COTANGENT, name)

    size = SHAPE[-1] // OPTIONS[name].get("num_groups", GROUPS)
    own = np.zeros(SHAPE, bool)
    first = place[-1] // size * size
    own[place[0], :, :, first : first + size] = True
    assert not np.isfinite(y[place])
    for actual, expected in zip((y, gradient), clean, strict=True):
        assert not np.isfinite(actual[own]).any(), "the group shows that its statistics are void"
        np.testing.assert_array_equal(actual[~own], expected[~own])


# With so many positions, sums go by blocks of blocks, and products give a value a channel at once.
@pytest.mark.parametrize("placed", [np.asarray, on_a_mesh])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_group_with_many_positions_and_on_a_mesh(value, placed):
    x, cotangent = random((3, 30, 20, 12)), random((3, 30, 20, 12), 3)

    @jax.jit
    def value_and_gradient(x):
        y, vjp = jax.vjp(lambda x: jgn.group_norm(x, GROUPS, SCALE, BIAS), x)
        return y, vjp(cotangent)[0]

    clean = jax.device_get(value_and_gradient(placed(x)))
    x[1, 23, 7, 7] = value
    own = np.zeros(x.shape, bool)
    own[1, ..., 6:9] = True
    for actual, expected in zip(value_and_gradient(placed(x)), clean, strict=True):
        assert not np.isfinite(actual[own]).any()
        np.testing.assert_array_equal(actual[~own], expected[~own])


@pytest.mark.parametrize("name", OPTIONS)
def test_a_cotangent_that_is_not_finite_stays_in_its_sample_and_group(name):
    x, cotangent = random(SHAPE), COTANGENT.copy()
    clean = jax.device_get(value_and_gradient(x, cotangent, name)[1])
    cotangent[1, 3, 2, 7] = np.nan
    gradient = value_and_gradient(x, cotangent, name)[1]
    size = SHAPE[-1] // OPTIONS[name].get("num_groups", GROUPS)
    own = np.zeros(SHAPE, bool)
    own[1, :, :, 7 // size * size : 7 // size * size + size] = True
    assert np.isnan(gradient[1, 3, 2, 7])
    np.testing.assert_array_equal(gradient[~own], clean[~own])


def test_a_parameter_that_is_nan_reaches_its_own_channel_and_only_gradients_of_its_group():
    x, scale = random(SHAPE), SCALE.copy()
    scale[7] = np.nan

    def normalized(x, scale):
        return jgn.group_norm(x, GROUPS, scale, BIAS)

    clean, clean_vjp = jax.vjp(normalized, x, SCALE)
    y, vjp = jax.vjp(normalized, x, scale)
    assert np.isnan(y[..., 7]).all()
    np.testing.assert_array_equal(np.delete(y, 7, -1), np.delete(clean, 7, -1))
    gradient, wanted = vjp(COTANGENT)[0], clean_vjp(COTANGENT)[0]
    np.testing.assert_array_equal(
        np.delete(gradient, (6, 7, 8), -1), np.delete(wanted, (6, 7, 8), -1)
    )
