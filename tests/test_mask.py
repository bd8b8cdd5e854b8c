"""What a mask leaves out counts for nothing, whatever it holds."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from oracle import Oracle, promised, tolerance, unit_roundoff

import jgn

SHAPE, GROUPS = (3, 6, 5, 8), 4
SCALE, BIAS, COTANGENT = random((8,), 1), random((8,), 2), random(SHAPE, 3)
LENGTHS = np.array([6, 4, 1])
UP_TO_LENGTH = np.arange(6).reshape(1, 6, 1, 1) < LENGTHS.reshape(3, 1, 1, 1)
SILU = pytest.mark.parametrize("activation", [None, jax.nn.silu])

# Every shape that NumPy broadcasts to x: any of the last axes, each in full or of size 1.
BROADCASTABLE = [
    shape
    for rank in range(len(SHAPE) + 1)
    for shape in itertools.product(*((size, 1) for size in SHAPE[len(SHAPE) - rank :]))
]


@pytest.mark.parametrize("shape", BROADCASTABLE, ids=str)
def test_every_broadcastable_shape(shape):
    x = random(SHAPE)
    mask = np.random.default_rng(4).random(shape) < 0.6
    y = jgn.group_norm(x, GROUPS, SCALE, BIAS, mask=mask)
    oracle = Oracle(x, GROUPS, SCALE, BIAS, mask=mask)
    # A group without a True has variance 0: its outputs are large, so each is judged by itself.
    allowed = promised("float32", 60) * oracle.largest(oracle.y)
    assert (np.abs(y - oracle.y) <= allowed).all()


def test_a_complex_x():
    x, mask = random(SHAPE, dtype="complex64"), np.random.default_rng(4).random(SHAPE) < 0.6
    cotangent = random(SHAPE, 3, dtype="complex64")
    y, vjp = jax.vjp(lambda x: jgn.group_norm(x, GROUPS, mask=mask), x)
    oracle = Oracle(x, GROUPS, mask=mask)
    for actual, wanted in ((y, oracle.y), (vjp(cotangent)[0], oracle.gradients(cotangent).x)):
        atol = tolerance("float32", 60) * np.abs(wanted).max()
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("channel_axis", [0, 1, 2])
def test_with_the_channels_elsewhere(channel_axis):
    x, mask = random((4, 8, 12)), np.random.default_rng(4).random((4, 8, 12)) < 0.6
    y = jgn.group_norm(x, 4, channel_axis=channel_axis, mask=mask)
    wanted = Oracle(x, 4, channel_axis=channel_axis, mask=mask).y
    np.testing.assert_allclose(
        y, wanted, rtol=0, atol=tolerance("float32", x.size // 4) * np.abs(wanted).max()
    )


def test_the_unmasked_part_is_normalized_as_if_alone():
    x = random(SHAPE)
    y = jgn.group_norm(x, GROUPS, SCALE, BIAS, mask=UP_TO_LENGTH)
    for sample, length in enumerate(LENGTHS):
        part = slice(sample, sample + 1), slice(length)
        alone = jgn.group_norm(x[part], GROUPS, SCALE, BIAS)
        np.testing.assert_allclose(
            y[part], alone, rtol=0, atol=tolerance("float32", 60) * np.abs(alone).max()
        )


@pytest.mark.parametrize("junk", [np.nan, np.inf, -3e38])
def test_what_has_no_finite_square_is_read_as_0_where_it_does_not_count(junk):
    def with_padding(value):
        x = np.where(UP_TO_LENGTH, random(SHAPE), np.float32(value))
        return jgn.group_norm(x, GROUPS, SCALE, BIAS, mask=UP_TO_LENGTH)

    np.testing.assert_array_equal(with_padding(junk), with_padding(0))


def test_a_mask_of_true_changes_nothing():
    x = random(SHAPE)
    for mask in (True, np.ones((6, 1, 1), bool), np.ones(SHAPE, bool)):
        y = jgn.group_norm(x, GROUPS, SCALE, BIAS, mask=mask)
        plain = jgn.group_norm(x, GROUPS, SCALE, BIAS)
        atol = tolerance("float32", 60) * np.abs(plain).max()
        np.testing.assert_allclose(y, plain, rtol=0, atol=atol)


@functools.partial(jax.jit, static_argnames="activation")
def values_and_gradients(x, mask, activation):
    """The outputs where the mask is True, and the gradients of a loss over only those."""

    def loss(x, scale, bias):
        y = jgn.group_norm(x, GROUPS, scale, bias, mask=mask, activation=activation)
        y = jnp.where(mask, y, 0)
        return (COTANGENT.astype(y.dtype) * y).sum(), y

    return jax.grad(loss, (0, 1, 2), has_aux=True)(x, SCALE, BIAS)


@SILU
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_padding_changes_no_bit_whatever_it_holds(dtype, activation):
    largest = float(jnp.finfo(dtype).max)
    clean = np.where(UP_TO_LENGTH, random(SHAPE), 0).astype(jnp.dtype(dtype))
    wanted = values_and_gradients(clean, UP_TO_LENGTH, activation)
    chex.assert_tree_all_finite(wanted)
    junk = [np.nan, np.inf, -np.inf, min(1e38, largest), -largest, largest**0.5, 1e19, -1e3, 1e-30]
    with np.errstate(over="ignore"):
        fillings = [np.full(SHAPE, value).astype(jnp.dtype(dtype)) for value in junk]
    mixed = np.resize(np.stack(fillings)[:, 0, 0, 0, 0], SHAPE)
    for filling in [*fillings, mixed]:
        padded = np.where(UP_TO_LENGTH, clean, filling)
        actual = values_and_gradients(padded, UP_TO_LENGTH, activation)
        for got, expected in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(got, expected, err_msg=f"with {filling[0, 0, 0, 0]}")


@SILU
def test_no_gradient_reaches_the_padding_from_a_loss_beside_it(activation):
    padded = np.where(UP_TO_LENGTH, random(SHAPE), np.nan)
    (x_gradient, *_), _ = values_and_gradients(padded, UP_TO_LENGTH, activation)
    assert not np.where(UP_TO_LENGTH, 0, x_gradient).any()


def test_half_of_the_padding_poisoned_in_every_channel_pattern():
    mask = np.random.default_rng(5).random(SHAPE) < 0.5
    mask[0, :, :, :2] = False
    clean = np.where(mask, random(SHAPE), 0)
    poisoned = np.where(mask, clean, np.nan)
    chex.assert_trees_all_equal(
        values_and_gradients(poisoned, mask, None), values_and_gradients(clean, mask, None)
    )


def test_a_nan_under_the_mask_leaves_finite_output_there():
    poisoned = np.where(UP_TO_LENGTH, random(SHAPE), np.nan)
    chex.assert_tree_all_finite(jgn.group_norm(poisoned, GROUPS, mask=UP_TO_LENGTH))


def test_a_nan_that_counts_is_not_hidden_by_the_mask():
    x = random(SHAPE)
    x[0, 0, 0, 0] = np.nan
    y = jgn.group_norm(x, GROUPS, mask=UP_TO_LENGTH)
    assert np.isnan(y[0, :, :, :2]).all()


@SILU
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_group_without_a_true_is_finite(dtype, activation):
    x = random(SHAPE, dtype=dtype)
    mask = np.ones(SHAPE, bool)
    mask[1], mask[2, :, :, :2] = False, False

    def loss(x, scale, bias):
        y = jgn.group_norm(x, GROUPS, scale, bias, mask=mask, activation=activation)
        return y.astype("float32").sum(), y

    gradients, y = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(x, SCALE, BIAS)
    chex.assert_tree_all_finite((gradients, y))
    if activation is None:
        wanted = Oracle(x, GROUPS, SCALE, BIAS, mask=mask).y[1]
        atol = tolerance("float32", 1) * np.abs(wanted).max()
        np.testing.assert_allclose(y[1], wanted, rtol=unit_roundoff(dtype), atol=atol)


def test_a_masked_layer_ignores_how_far_its_input_is_padded():
    layer = jgn.GroupNorm(GROUPS)
    x = random((2, 5, 8))
    variables = layer.init(jax.random.key(0), x)
    wanted = layer.apply(variables, x, mask=np.ones((2, 5, 1), bool))
    padded = np.pad(x, ((0, 0), (0, 4), (0, 0)), constant_values=np.inf)
    y = layer.apply(variables, padded, mask=np.arange(9).reshape(1, 9, 1) < 5)
    atol = tolerance("float32", 10) * np.abs(wanted).max()
    np.testing.assert_allclose(y[:, :5], wanted, rtol=0, atol=atol)
