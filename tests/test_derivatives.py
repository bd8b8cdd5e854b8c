"""Gradients and Hessians equal the oracle's, and forward and reverse mode each other."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EVERY_CASE, batch_shape, random
from jax.test_util import check_grads
from oracle import Oracle, promised, tolerance, unit_roundoff, wide

import jgn


@functools.partial(jax.jit, static_argnums=(0,))
def gradients_of(function, cotangent, *arguments):
    return jax.vjp(function, *arguments)[1](cotangent)


def assert_gradients(actual, oracle, cotangent, dtype, elements):
    """Each gradient within the rounding of the terms that are summed in it."""
    wanted = oracle.gradients(cotangent)
    sums = tolerance(dtype, elements)
    errors = (
        promised(dtype, elements) * oracle.gradient_terms(cotangent),
        *(sums * np.abs(total).max() for total in wanted[1:]),
    )
    for gradient, expected, error in zip(actual, wanted, errors, strict=True):
        chex.assert_shape(gradient, expected.shape)
        allowed = error + unit_roundoff(gradient.dtype) * np.abs(expected)
        excess = np.abs(wide(gradient) - expected) - allowed
        assert excess.max() <= 0, f"{excess.max()} beyond what rounding explains"


@EVERY_CASE
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradients_for_every_shape_and_axis(shape, num_groups, options, per_sample):
    channels = shape[options.get("channel_axis", -1)]
    owners = (*batch_shape(shape, **options), channels) if per_sample else (channels,)
    x, scale, bias, cotangent = (
        random(each, seed) for seed, each in enumerate((shape, owners, owners, shape))
    )

    def normalized(x, scale, bias):
        return jgn.group_norm(x, num_groups, scale, bias, **options)

    actual = gradients_of(normalized, cotangent, x, scale, bias)
    oracle = Oracle(x, num_groups, scale, bias, **options)
    assert_gradients(actual, oracle, cotangent, "float32", x.size)


@pytest.mark.parametrize("shape", [(2, 400, 6), (2, 8, 12, 24), (2, 3, 64, 4)])
@pytest.mark.parametrize("mean", [1.0, 1e4])
def test_values_and_gradients_in_the_form_of_gpus(shape, mean, traced_for):
    traced_for("gpu")  # Which sums in parts, whichever device runs it.
    x, cotangent = random(shape, mean=mean), random(shape, 1)
    scale, bias = random(shape[-1:], 2), random(shape[-1:], 3)

    def normalized(x, scale, bias):
        return jgn.group_norm(x, 2, scale, bias)

    y = normalized(x, scale, bias)
    oracle = Oracle(x, 2, scale, bias)
    assert np.abs(wide(y) - oracle.y).max() <= promised("float32", x.size) * np.abs(oracle.y).max()
    gradients = gradients_of(normalized, cotangent, x, scale, bias)
    assert_gradients(gradients, oracle, cotangent, "float32", x.size)


SHAPE, GROUPS = (3, 6, 5, 8), 4
MASKS = {
    "no mask": None,
    "lengths": np.arange(6).reshape(1, 6, 1, 1) < np.array([6, 4, 1]).reshape(3, 1, 1, 1),
    "every element": np.random.default_rng(9).random(SHAPE) < 0.5,
    "an empty sample": np.array([True, False, True]).reshape(3, 1, 1, 1),
}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("mask", MASKS)
def test_gradients_for_every_dtype_and_mask(dtype, mask):
    x, cotangent = random(SHAPE, 0, dtype=dtype), random(SHAPE, 1, dtype=dtype)
    scale, bias = random((8,), 2, dtype=dtype), random((8,), 3, dtype=dtype)
    mask = MASKS[mask]

    def normalized(x, scale, bias):
        return jgn.group_norm(x, GROUPS, scale, bias, mask=mask)

    with jax.enable_x64(dtype == "float64"):
        actual = gradients_of(normalized, cotangent, x, scale, bias)
    chex.assert_type(actual, jnp.dtype(dtype))
    assert_gradients(actual, Oracle(x, GROUPS, scale, bias, mask=mask), cotangent, dtype, x.size)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
def test_complex_gradients(dtype):
    x, scale, bias, cotangent = (
        random(shape, seed, dtype=dtype) for seed, shape in enumerate((SHAPE, (8,), (8,), SHAPE))
    )

    def normalized(x, scale, bias):
        return jgn.group_norm(x, GROUPS, scale, bias)

    with jax.enable_x64(dtype == "complex128"):
        actual = gradients_of(normalized, cotangent, x, scale, bias)
    assert_gradients(actual, Oracle(x, GROUPS, scale, bias), cotangent, dtype, x.size)


def test_gradients_through_the_activation():
    x, cotangent = random(SHAPE, 0), random(SHAPE, 1)
    scale, bias = random((8,), 2), random((8,), 3)

    def normalized(x, scale, bias):
        return jgn.group_norm(x, GROUPS, scale, bias, activation=jax.nn.silu)

    oracle = Oracle(x, GROUPS, scale, bias)
    sigmoid = 1 / (1 + np.exp(-oracle.y))
    silu_derivative = sigmoid * (1 + oracle.y * (1 - sigmoid))
    actual = gradients_of(normalized, cotangent, x, scale, bias)
    assert_gradients(actual, oracle, cotangent * silu_derivative, "float32", x.size)


def test_mixed_dtypes_give_each_gradient_in_the_dtype_of_its_argument():
    x, scale, bias = (
        random(SHAPE, dtype="bfloat16"),
        random((8,), 1),
        random((8,), 2, dtype="float16"),
    )
    cotangent = random(SHAPE, 3, dtype="bfloat16")

    def normalized(x, scale, bias):
        return jgn.group_norm(x, GROUPS, scale, bias)

    actual = gradients_of(normalized, cotangent, x, scale, bias)
    assert [gradient.dtype for gradient in actual] == ["bfloat16", "float32", "float16"]
    assert_gradients(actual, Oracle(x, GROUPS, scale, bias), cotangent, "float32", x.size)


CURVATURE = pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": np.array([[[1], [0], [1]], [[1], [1], [1]]], bool)},
        {"channel_axis": 1, "epsilon": 0.1},
    ],
    ids=["plain", "mask", "channels in the middle"],
)


@CURVATURE
def test_the_hessian(options):
    x, scale, cotangent = (random((2, 3, 6), seed, dtype="float64") for seed in range(3))
    scale = scale[0, 0] if "channel_axis" not in options else scale[0, :, 0]
    num_groups = 3 if "channel_axis" not in options else 1
    oracle = Oracle(x, num_groups, scale, **options)
    directions = np.eye(x.size).reshape(x.size, *x.shape)
    wanted = np.stack([oracle.hessian_vector_product(cotangent, v) for v in directions])

    with jax.enable_x64(True):

        def loss(x):
            return jnp.vdot(cotangent, jgn.group_norm(x, num_groups, scale, **options))

        actual = jax.jit(jax.hessian(loss))(x).reshape(wanted.shape)
    atol = tolerance("float64", x.size) * np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("mode", ["fwd", "rev"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": np.array([[[1], [0], [1]], [[0], [0], [0]]], bool)},
        {"activation": jax.nn.silu, "per_sample": True},
        {"activation": jnp.tanh, "channel_axis": 1, "groups": 3, "per_sample": True},
        {"complex": True},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_derivatives_of_order_two(options, mode):
    options = dict(options)
    num_groups, per_sample = options.pop("groups", 2), options.pop("per_sample", False)
    dtype = "complex128" if options.pop("complex", False) else "float64"
    x = random((2, 3, 4), dtype=dtype)
    channels = x.shape[options.get("channel_axis", -1)]
    owners = (2, channels) if per_sample else (channels,)
    scale, bias = random(owners, 1, dtype="float64"), random(owners, 2, dtype="float64")

    with jax.enable_x64(True):

        @jax.jit
        def normalized(x, scale, bias):
            # An epsilon for which groups without a True curve mildly enough for differences.
            return jgn.group_norm(x, num_groups, scale, bias, epsilon=0.5, **options)

        # Differences of step h lose h² and u/h: at best u^(2/3), and over a second derivative more.
        check_grads(normalized, (x, scale, bias), 2, [mode], atol=1e-6, rtol=1e-6)


def test_forward_and_reverse_mode_agree():
    x, tangent, cotangent = (random(SHAPE, seed) for seed in range(3))
    scale, bias, scale_tangent, bias_tangent = (random((8,), seed) for seed in range(3, 7))
    tangents = (tangent, scale_tangent, bias_tangent)

    def normalized(x, scale, bias):
        return jgn.group_norm(x, GROUPS, scale, bias, activation=jax.nn.silu)

    forward = jax.jvp(normalized, (x, scale, bias), tangents)[1]
    reverse = gradients_of(normalized, cotangent, x, scale, bias)
    products = [np.multiply(g, t, dtype=np.float64) for g, t in zip(reverse, tangents, strict=True)]
    products = np.concatenate([product.ravel() for product in products])
    size = np.abs(products).sum()
    forward_products = np.multiply(forward, cotangent, dtype=np.float64)
    np.testing.assert_allclose(
        products.sum(), forward_products.sum(), rtol=0, atol=tolerance("float32", x.size) * size
    )


@pytest.mark.parametrize("masked", [False, True])
def test_a_constant_group_has_the_gradient_of_the_equation(masked):
    constants = np.array([0, 1 / 3, 1000.1]).reshape(3, 1, 1, 1)
    x = np.broadcast_to(constants, SHAPE).astype(np.float32)
    scale, bias, cotangent = random((8,), 1), random((8,), 2), random(SHAPE, 3)
    mask = np.arange(6).reshape(1, 6, 1, 1) < 5 if masked else None

    def normalized(x, scale, bias):
        return jgn.group_norm(x, GROUPS, scale, bias, mask=mask)

    actual = gradients_of(normalized, cotangent, x, scale, bias)
    assert not actual[1].any(), "the normalized value is 0 everywhere"
    assert_gradients(
        actual, Oracle(x, GROUPS, scale, bias, mask=mask), cotangent, "float32", x.size
    )


def test_the_third_derivative_where_the_variance_is_zero():
    """The first that sees what keeps the variance from falling below 0."""
    direction, epsilon = random((1, 12)), 0.5

    def along(t):
        return jgn.group_norm(jnp.ones((1, 12)) + t * direction, 1, epsilon=epsilon)

    function = along
    for _ in range(3):
        function = functools.partial(lambda f, t: jax.jvp(f, (t,), (1.0,))[1], function)
    # y = t·u / √(t²·s + ε) = (t − t³·s / 2ε + …)·u / √ε, with u centred and s its variance.
    centred = direction.astype(np.float64) - direction.mean(dtype=np.float64)
    wanted = -3 * centred.var() * centred / epsilon**1.5
    atol = tolerance("float32", 12) * np.abs(wanted).max()
    np.testing.assert_allclose(function(0.0), wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("epsilon", [0, 1e-30])
def test_a_constant_group_without_epsilon_has_a_finite_gradient(epsilon):
    x, cotangent = np.ones(SHAPE, np.float32), random(SHAPE, 1)
    x[0] = random(SHAPE[1:])
    gradient = gradients_of(lambda x: jgn.group_norm(x, GROUPS, epsilon=epsilon), cotangent, x)[0]
    chex.assert_tree_all_finite(gradient)
    wanted = Oracle(x[:1], GROUPS, epsilon=epsilon).gradients(cotangent[:1]).x
    allowed = promised("float32", 60) * np.abs(wanted).max()
    assert np.abs(wide(gradient[:1]) - wanted).max() <= allowed
    if not epsilon:
        assert not gradient[1:].any(), "all of it is bias"


def test_a_group_of_one_element_has_no_gradient():
    x, cotangent = random((5, 12)), random((5, 12), 1)
    gradient = gradients_of(lambda x: jgn.group_norm(x, 12), cotangent, x)[0]
    # r · (a − a): each of the two terms is rounded, or neither.
    size = Oracle(x, 12).gradient_terms(cotangent)
    assert (np.abs(gradient) <= tolerance("float32", 1) * size).all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("n", [6, 10, 12, 14, 24, 40, 96, 200])
def test_a_large_mean_costs_small_groups_no_digits_of_their_gradient(n, masked):
    """XLA:CPU multiplies by 1/n, and contracts that into a following sum in some loops only."""
    x, cotangent = random((8, n, 1, 8)) + np.float32(1e4), random((8, n, 1, 8), 1)
    options = {"epsilon": 0.0, "mask": np.ones(x.shape, bool) if masked else None}

    @jax.jit
    def gradient(x):
        return jax.vjp(lambda x: jgn.group_norm(x, 8, **options), x)[1](cotangent)[0]

    wanted = Oracle(x, 8, **options).gradients(cotangent).x
    atol = tolerance("float32", n) * np.abs(wanted).max()
    np.testing.assert_allclose(gradient(x), wanted, rtol=0, atol=atol)
