"""Values equal the oracle's: every shape, axis, dtype and magnitude."""

import itertools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import EVERY_CASE, batch_shape, on_a_mesh, random, value_and_gradient_of
from jax import export
from oracle import Oracle, moment_roundoff, promised, tolerance, unit_roundoff, wide

import jgn
from jgn._axes import resolve_axes
from jgn._group_norm import positions_of
from jgn._moments import STRIDE

FLOATING = ("float16", "bfloat16", "float32", "float64")
EVERY_DTYPE = pytest.mark.parametrize("dtype", FLOATING)


def with_x64(dtype):
    return jax.enable_x64(dtype in ("float64", "complex128"))


def assert_values(y, oracle, dtype, elements):
    """The moments' rounding, relative to the largest output, and one to the output's dtype."""
    np.testing.assert_allclose(
        wide(y),
        oracle.y,
        rtol=unit_roundoff(dtype),
        atol=promised(dtype, elements) * np.abs(oracle.y).max(),
    )


@EVERY_CASE
@pytest.mark.parametrize("placed", [np.asarray, on_a_mesh])
def test_every_shape_and_axis(shape, num_groups, options, placed):
    x = placed(random(shape))
    channels = shape[options.get("channel_axis", -1)]
    scale, bias = random((channels,), 1), random((channels,), 2)
    y = jgn.group_norm(x, num_groups, scale, bias, **options)
    chex.assert_shape(y, shape)
    assert_values(y, Oracle(x, num_groups, scale, bias, **options), "float32", x.size // num_groups)


@EVERY_CASE
def test_a_scale_and_a_bias_for_each_sample(shape, num_groups, options):
    x = random(shape)
    rows = (*batch_shape(shape, **options), shape[options.get("channel_axis", -1)])
    scale, bias = random(rows, 1), random(rows, 2)
    y = jgn.group_norm(x, num_groups, scale, bias, **options)
    assert_values(y, Oracle(x, num_groups, scale, bias, **options), "float32", x.size // num_groups)


@pytest.mark.parametrize("epsilon", [0, 1e-6, 1e-3, 10])
@pytest.mark.parametrize("names", [(), ("scale",), ("bias",)])
def test_every_epsilon_with_scale_or_bias_or_neither(epsilon, names):
    x = random((3, 6, 5, 8))
    options = {name: random((8,), 1) for name in names}
    y = jgn.group_norm(x, 4, epsilon=epsilon, **options)
    assert_values(y, Oracle(x, 4, epsilon=epsilon, **options), "float32", 60)


@EVERY_DTYPE
@pytest.mark.parametrize("num_groups", [1, 4, 8])
def test_every_floating_dtype(dtype, num_groups):
    x = random((3, 6, 5, 8), dtype=dtype)
    scale, bias = random((8,), 1, dtype=dtype), random((8,), 2, dtype=dtype)
    with with_x64(dtype):
        y = jgn.group_norm(x, num_groups, scale, bias)
    assert y.dtype == dtype
    assert_values(y, Oracle(x, num_groups, scale, bias), dtype, x.size // num_groups)


@pytest.mark.parametrize("dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("num_groups", [1, 4, 8])
def test_every_complex_dtype(dtype, num_groups):
    x = random((3, 6, 5, 8), dtype=dtype)
    scale, bias = x[0, 0, 0], random((8,), 2)
    with with_x64(dtype):
        y = jgn.group_norm(x, num_groups, scale, bias)
    assert y.dtype == dtype
    assert_values(y, Oracle(x, num_groups, scale, bias), dtype, x.size // num_groups)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int32", "uint32"])
def test_integers_and_booleans_become_what_a_mean_makes_of_them(dtype, x64):
    x = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 120, (3, 6, 5, 8))
    x = x.astype(dtype)
    with jax.enable_x64(x64):
        y = jgn.group_norm(x, 4)
        assert y.dtype == jnp.mean(x).dtype
        assert_values(y, Oracle(x, 4), y.dtype, 60)


@pytest.mark.parametrize(
    ("x_dtype", "scale_dtype", "dtype", "expected"),
    [
        ("float32", "float32", None, "float32"),
        ("bfloat16", "float32", None, "bfloat16"),
        ("float16", "float32", None, "float16"),
        ("float32", "bfloat16", None, "float32"),
        ("int32", "bfloat16", None, "float32"),
        ("complex64", "float32", None, "complex64"),
        ("bfloat16", "float32", "float32", "float32"),
        ("float32", "float32", "bfloat16", "bfloat16"),
        ("float32", "float32", jnp.float16, "float16"),
        ("int32", "float32", "bfloat16", "bfloat16"),
        ("float32", "float32", np.dtype("complex64"), "complex64"),
    ],
)
def test_the_output_has_the_dtype_of_x_unless_told(x_dtype, scale_dtype, dtype, expected):
    x, scale = random((3, 6, 5, 8), dtype=x_dtype), random((8,), 1, dtype=scale_dtype)
    y = jgn.group_norm(x, 4, scale, dtype=dtype)
    assert y.dtype == expected
    assert_values(y, Oracle(x, 4, scale), expected, 60)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_rounded_once_at_the_end(dtype):
    x, scale = random((3, 6, 5, 8), dtype=dtype), random((8,), 1)
    for activation in (None, jax.nn.silu):
        y = jgn.group_norm(x, 4, scale, activation=activation)
        wide = jgn.group_norm(x, 4, scale, activation=activation, dtype="float32")
        chex.assert_trees_all_equal(y, wide.astype(dtype))


class Variants(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_jit_and_device_placement_change_nothing(self):
        x, scale, bias = random((3, 6, 5, 8)), random((8,), 1), random((8,), 2)
        y = self.variant(lambda x: jgn.group_norm(x, 4, scale, bias))(x)
        assert_values(y, Oracle(x, 4, scale, bias), "float32", 60)


def test_the_activation_is_applied_to_y():
    x, scale, bias = random((3, 6, 5, 8)), random((8,), 1), random((8,), 2)
    y = jgn.group_norm(x, 4, scale, bias, activation=jax.nn.silu)
    wanted = Oracle(x, 4, scale, bias).y
    wanted = wanted / (1 + np.exp(-wanted))
    np.testing.assert_allclose(y, wanted, rtol=0, atol=tolerance("float32", 60) * wanted.max())


@EVERY_DTYPE
@pytest.mark.parametrize("masked", [False, True])
def test_a_group_of_equal_elements_gives_exactly_its_bias(dtype, masked):
    largest = float(jnp.finfo(dtype).max)
    constants = [0.0, 1 / 3, -0.1, 1000.1, 65504.0, -1e-7, 3e-5]
    # 0.54: the square is infinite, but not that of the mean's rounding error.
    constants += [sign * largest**power for power in (0.49, 0.54) for sign in (1, -1)]
    x = np.broadcast_to(np.reshape(constants, (-1, 1, 1, 1)), (len(constants), 7, 11, 12))
    x = x.astype(jnp.dtype(dtype)) * np.repeat([1, 0.5, -0.25], 4).astype(jnp.dtype(dtype))
    scale, bias = random((12,), 1, dtype=dtype), random((12,), 2, dtype=dtype)
    mask = np.arange(7).reshape(1, 7, 1, 1) < 5 if masked else None
    with with_x64(dtype):
        y = jgn.group_norm(x, 3, scale, bias, mask=mask)
    # What does not count, and has no finite square, is read as 0.
    read = True if mask is None else mask | (np.abs(wide(x)) < largest**0.5)
    np.testing.assert_array_equal(np.where(read, y, bias), np.broadcast_to(bias, x.shape))


@pytest.mark.parametrize("epsilon", [1e-5, 0])
@pytest.mark.parametrize(
    ("shape", "num_groups"),
    [
        ((64, 64, 320), 32),
        ((100, 128, 24), 3),
        ((7, 7, 2048), 1),
        ((1000, 999, 3), 1),
        ((595, 23, 33), 1),
        ((1009, 1013, 7), 1),
    ],
)
def test_a_large_group_of_equal_elements_gives_exactly_its_bias(shape, num_groups, epsilon):
    """Though the sums that lead to its mean and variance are rounded."""
    number = min(60, 2**25 // np.prod(shape))
    constants = np.random.default_rng(1).lognormal(0, 10, number).astype(np.float32)
    x = np.broadcast_to(constants.reshape(-1, 1, 1, 1), (len(constants), *shape))
    bias = random(shape[-1:], 2) * (np.arange(shape[-1]) % 2)
    y = jgn.group_norm(x, num_groups, bias=bias, epsilon=epsilon)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("masked", [False, True])
def test_equal_elements_give_exactly_their_bias_in_the_form_of_every_backend(masked):
    """Also where XLA makes the quotient by n a product with its reciprocal, and n · (1/n) < 1."""
    constants = np.random.default_rng(0).lognormal(0, 10, 200).astype(np.float32)
    x = np.broadcast_to(constants.reshape(-1, 1, 1, 1), (200, 4, 41, 6))
    n = 4 * 41 * 3
    assert np.float32(n) * np.float32(1 / n) < 1
    mask = np.arange(41).reshape(1, 1, 41, 1) < 40 if masked else None
    bias = random((6,), 2)

    def normalized(scale):
        return jgn.group_norm(x, 2, scale, bias, mask=mask)

    y, tangent = jax.jvp(normalized, (jnp.ones(6),), (jnp.ones(6),))
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    assert not tangent.any(), "the normalized value is 0 everywhere"


@pytest.mark.usefixtures("backend")
def test_the_variance_of_equal_elements_is_never_negative():
    """In a GPU's form rounding makes it so for a fourth of these, and its root would be NaN."""
    constants = np.random.default_rng(1).lognormal(0, 10, 100).astype(np.float32)
    x = np.broadcast_to(constants.reshape(-1, 1, 1, 1), (100, 7, 11, 12))
    np.testing.assert_array_equal(jgn.group_norm(x, 3, epsilon=0), np.zeros(x.shape))


@EVERY_DTYPE
def test_one_element_a_group_gives_exactly_its_bias(dtype):
    x, bias = random((5, 12), dtype=dtype), random((12,), 1, dtype=dtype)
    with with_x64(dtype):
        y = jgn.group_norm(x, 12, bias=bias)
        y_without_epsilon = jgn.group_norm(x, 12, bias=bias, epsilon=0)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    np.testing.assert_array_equal(y_without_epsilon, np.broadcast_to(bias, x.shape))


@pytest.mark.parametrize("shape", [(0, 12), (0, 4, 5, 12), (2, 0, 12)])
def test_an_empty_x_gives_an_empty_result_and_no_gradient(shape):
    x, scale, bias = np.zeros(shape, "float16"), np.ones(12, "float32"), np.ones(12, "float32")

    def total(x, scale, bias):
        return jgn.group_norm(x, 4, scale, bias).sum()

    y = jgn.group_norm(x, 4, scale, bias)
    assert (y.shape, y.dtype) == (shape, np.float16)
    gradients = jax.grad(total, (0, 1, 2))(x, scale, bias)
    chex.assert_trees_all_equal(gradients, (jnp.zeros_like(x), np.zeros(12), np.zeros(12)))


@pytest.mark.parametrize("num_groups", [1, 8, 32])
def test_a_mean_of_a_million_deviations_costs_no_digits(num_groups):
    ratios = np.array([0, 1, 1e2, 1e4, 1e5, 1e6, -1e6])
    deviations = np.array([1, 1, 0.1, 3, 1, 1, 1])
    x = random((7, 16, 16, 32)) - 1
    x = x * deviations.reshape(-1, 1, 1, 1) + (ratios * deviations).reshape(-1, 1, 1, 1)
    x = x.astype(np.float32)
    cotangent = random(x.shape, 1, 0, 1)
    scale, bias = random((32,), 2), random((32,), 3)

    def error(actual, wanted):
        worst = np.abs(np.asarray(actual, np.float64) - wanted).max((1, 2, 3))
        return worst / np.abs(wanted).max((1, 2, 3))

    y, vjp = jax.vjp(lambda x: jgn.group_norm(x, num_groups, scale, bias), x)
    oracle = Oracle(x, num_groups, scale, bias)
    assert error(y, oracle.y).max() <= 1e-6
    assert error(vjp(cotangent)[0], oracle.gradients(cotangent).x).max() <= 1e-6

    groups = x.reshape(7, 256, num_groups, -1)
    mean, square = (p.mean((1, 3), keepdims=True) for p in (groups, groups * groups))
    textbook = (groups - mean) / np.sqrt(np.maximum(square - mean * mean, 0) + np.float32(1e-5))
    textbook = textbook.reshape(x.shape) * scale + bias
    assert error(textbook, oracle.y)[-1] > 1e-2, "E[x²] − E[x]² is no match"


@pytest.mark.parametrize(
    ("masked", "placed"), [(False, np.asarray), (True, np.asarray), (True, on_a_mesh)]
)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 40, 24), {}),
        ((2, 23, 31, 24), {}),
        ((2, 24, 23, 31), {"channel_axis": 1}),
        ((2, 24, 1009), {"channel_axis": 1}),
    ],
)
def test_a_large_mean_costs_no_digits_in_any_layout_masked_or_on_a_mesh(
    shape, options, masked, placed
):
    x, cotangent = random(shape, mean=2e6), random(shape, 1)
    if masked:
        options = {**options, "mask": np.random.default_rng(4).random(shape) < 0.7}

    y, gradient = value_and_gradient_of(3, **options)(placed(x), cotangent)
    oracle = Oracle(x, 3, **options)
    for actual, wanted in ((y, oracle.y), (gradient, oracle.gradients(cotangent).x)):
        assert np.abs(wide(actual) - wanted).max() <= 1e-6 * np.abs(wanted).max()


def test_a_narrower_output_narrows_no_statistics():
    with jax.enable_x64(True):
        x = 1e9 + random((3, 16, 8)).astype(np.float64)
        y = jgn.group_norm(x, 2, dtype="float32")
        assert y.dtype == np.float32
        assert_values(y, Oracle(x, 2), "float32", 64)


def sampled(row, column):
    """Which of 64×128 positions a CPU samples for the shift."""
    return (row % 11 == 4) & (column % 5 == 1) & (column >= 6) & (column <= 121)


def test_the_adversaries_know_the_sample(traced_for):
    traced_for("cpu")
    numbers = np.broadcast_to(np.arange(64.0 * 128).reshape(1, 64, 128, 1), (1, 64, 128, 4))
    axes = resolve_axes(4, -1, None)
    sample = positions_of(numbers, axes, numbers.dtype).sample(numbers, STRIDE, multiple_of=3)
    row, column = np.indices((64, 128))
    assert np.array_equal(np.unique(sample), numbers[0, ..., 0][sampled(row, column)])


def adversaries():
    """Outliers where a sample of the group's elements might be taken, in samples of their own."""
    height, width, channels = 64, 128, 4
    noise = random((height, width, channels), 0, 0, 1)
    row, column, channel = np.indices(noise.shape)
    first = {
        "first element": (row == 0) & (column == 0) & (channel == 0),
        "first position": (row == 0) & (column == 0),
        "first row": row == 0,
        "first column": column == 0,
        "first channel": channel == 0,
        "one position in 64": (row * width + column) % 64 == 0,
        "one position in 64 by rows": (column * height + row) % 64 == 0,
        "one in 8 by 8": (row % 8 == 0) & (column % 8 == 0),
        "last row": row == height - 1,
        "the sample of jgn": sampled(row, column),
        "two thirds of it": sampled(row, column) & (column < 84),
    }
    outliers = [
        np.where(where, size, noise) for where in first.values() for size in (1e2, 1e4, -1e7)
    ]
    return np.stack(outliers).astype(np.float32), [name for name in first for _ in range(3)]


@pytest.mark.parametrize("channel_axis", [-1, 1])
def test_no_placement_of_outliers_breaks_the_bound_on_the_variance(channel_axis):
    x, names = adversaries()
    wanted = Oracle(x, 1).y
    scale = np.abs(wanted).max((1, 2, 3))
    # E[d²] is at most 1 + 96 times the variance: two thirds of the sample, one in 96 elements, are
    # as far from the mean as k. Each term that is added to its sum may round once: those of blocks
    # of 16, twice, and the up to 64 that these leave. The root halves that.
    roundings = 16 + 16 + 64
    bound = 97 * roundings / 2 * moment_roundoff("float32")
    y = np.moveaxis(
        jgn.group_norm(np.moveaxis(x, -1, channel_axis), 1, channel_axis=channel_axis),
        channel_axis,
        -1,
    )
    errors = np.abs(y - wanted).max((1, 2, 3)) / scale
    assert errors.max() <= bound, dict(zip(names, errors, strict=True))
    assert errors.max() <= 6e-5, "README gives this as the worst that was found"

    pivot = x[:, :1, :1, :1]
    mean = (x - pivot).mean((1, 2, 3), keepdims=True)
    variance = np.square(x - pivot).mean((1, 2, 3), keepdims=True) - mean * mean
    naive = (x - pivot - mean) / np.sqrt(variance + np.float32(1e-5))
    assert (np.abs(naive - wanted).max((1, 2, 3)) / scale).max() > bound, "one element is no pivot"


@pytest.mark.parametrize("channel_axis", [-1, 1])
def test_padding_with_zeros_costs_no_digits(channel_axis):
    """What frames an image, or starts a sequence, is often unlike all the rest.

    In the form of this device alone: a GPU's sums are trees, which a CPU would take term by term,
    and of 3,584 terms after one of 10⁸ little is left.
    """

    value_and_gradient = value_and_gradient_of(4, channel_axis=channel_axis)
    borders = {
        "first row": (slice(0, 1), slice(None)),
        "last column": (slice(None), slice(-1, None)),
        "first position": (slice(0, 1), slice(0, 1)),
    }
    for (name, border), interior in itertools.product(borders.items(), (5, 100, 1e4)):
        x = random((2, 56, 64, 16), 0, interior, 1)
        x[:, *border] = 0
        x = np.moveaxis(x, -1, channel_axis)
        cotangent = random(x.shape, 1, 0, 1)
        oracle = Oracle(x, 4, channel_axis=channel_axis)
        wanted = oracle.y, oracle.gradients(cotangent).x
        for actual, expected in zip(value_and_gradient(x, cotangent), wanted, strict=True):
            error = np.abs(actual - expected).max() / np.abs(expected).max()
            assert error <= 1e-6, f"{name} of zeros around {interior}"


@pytest.mark.parametrize(
    ("spatial", "channels", "num_groups", "dtype"),
    [
        ((16, 16), 8, 1, "float32"),
        ((16, 16), 8, 8, "float32"),
        ((31, 9), 12, 4, "float32"),
        ((7, 7), 64, 1, "float32"),
        ((16,), 256, 8, "float32"),  # A larger sample.
        ((199,), 8, 2, "complex64"),
    ],
)
def test_one_far_element_costs_no_digits_wherever_it_is(spatial, channels, num_groups, dtype):
    """In a sample it makes mean and variance up to 64 times what they are.

    It is at another position in each sample of the batch.
    """
    places = math.prod(spatial)
    shape = (places, *spatial, channels)

    value_and_gradient = value_and_gradient_of(num_groups)
    cotangents = random(shape, 1, 0, 1).astype(dtype), np.full(shape, 0.7, dtype)
    for deviation, cotangent in itertools.product((0, 1), cotangents):
        x = random((places, places, channels), 0, 0, deviation).astype(dtype)
        x[range(places), range(places), :: channels // num_groups] = 1e6
        sigma = wide(x).reshape(places, -1, num_groups, channels // num_groups).std((1, 3))
        x = x.reshape(shape)
        y, gradient = value_and_gradient(x, cotangent)
        oracle = Oracle(x, num_groups)
        assert np.abs(y - oracle.y).max() <= 1e-6 * np.abs(oracle.y).max()
        # Of a constant one hardly anything is left, so what counts are the terms, cotangent / σ.
        error = np.abs(gradient - oracle.gradients(cotangent).x).max()
        assert error <= 1e-6 * np.abs(cotangent).max() / sigma.min()


@pytest.mark.parametrize(("shape", "num_groups"), [((1, 128, 128, 32), 1), ((2, 37, 41, 6), 3)])
def test_of_a_constant_cotangent_only_rounding_is_left(shape, num_groups):
    """The gradient of Σy is 0; its terms, cotangent / σ, are not."""
    value_and_gradient = value_and_gradient_of(num_groups, epsilon=0)
    cotangent = np.full(shape, 0.7, np.float32)
    for mean in (0, 0.5, 1, 1.9, 3, 1e3):
        x = random(shape, mean=mean, deviation=1)
        _, gradient = value_and_gradient(x, cotangent)
        assert np.abs(gradient).max() <= 1e-6 * 0.7 / x.std(), f"mean {mean} σ"


def assert_every_group(x, num_groups, value_and_gradient, cotangent=None, channel_axis=-1):
    """Each is as accurate as if it were alone."""
    cotangent = random(x.shape, 1, 0, 1) if cotangent is None else cotangent
    y, gradient = value_and_gradient(x, cotangent)
    oracle = Oracle(x, num_groups, channel_axis=channel_axis)
    assert (np.abs(wide(y) - oracle.y) <= 1e-6 * oracle.largest(oracle.y)).all()
    error = np.abs(wide(gradient) - oracle.gradients(cotangent).x)
    assert (error <= 1e-6 * oracle.gradient_terms(cotangent)).all()


def moved_apart(spatial, period, mean):
    """Images whose pixels were moved apart, with zeros between them, in every phase."""
    phases = list(np.ndindex(*(period for _ in spatial)))
    x = np.zeros((len(phases), *spatial, 4), np.float32)
    for sample, phase in zip(x, phases, strict=True):
        pixels = sample[tuple(slice(first, None, period) for first in phase)]
        pixels[...] = random(pixels.shape, 0, mean, 1)
    return x


@pytest.mark.parametrize("period", [2, 3, 4, 6, 8, 12, 16])
@pytest.mark.parametrize("spatial", [(64, 64), (56, 80), (100,), (1024,)])
def test_a_pattern_costs_no_digits_whatever_its_phase(spatial, period):
    value_and_gradient = value_and_gradient_of(2)
    for mean in (0, 1, 100):
        assert_every_group(moved_apart(spatial, period, mean), 2, value_and_gradient)


@pytest.mark.parametrize(
    ("spatial", "channels"),
    [
        ((16, 32, 32), 4),
        ((8, 24, 24), 4),
        ((32, 16, 16), 4),
        ((24, 8, 16), 4),
        ((4, 8, 8, 8), 4),
        ((48, 48), 4),
        ((9, 9), 128),
        ((10, 10), 128),
    ],
)
def test_a_plane_unlike_the_others_costs_no_digits_wherever_it_is(spatial, channels):
    """A frame of a video, a slice of a volume, a row; another in each sample of the batch."""
    planes = range(spatial[0])
    value_and_gradient = value_and_gradient_of(2)
    for far in (3, 50, 1e4):
        x = random((len(planes), *spatial, channels), 0, 0, 1)
        x[planes, planes] += np.float32(far)
        assert_every_group(x, 2, value_and_gradient)


def exported_for(sizes, value_and_gradient):
    """It, for any sizes: traced for symbolic ones."""
    x = jax.ShapeDtypeStruct(export.symbolic_shape(sizes), "float32")
    return jax.jit(export.export(value_and_gradient)(x, x).call)


def two_values(generator, share, shape, dtype="float32"):
    values = np.where(generator.random(shape) < share, *generator.uniform(-2, 2, 2))
    return (values * (1 if dtype == "float32" else 1 + 0.3j)).astype(dtype)


@pytest.mark.parametrize(
    ("mask", "placed"), [(None, np.asarray), (True, np.asarray), (None, on_a_mesh)]
)
@pytest.mark.parametrize(
    ("shape", "num_groups", "channel_axis", "dtype"),
    [
        ((1, 64, 64, 64, 8), 1, -1, "float32"),
        ((1, 128, 128, 128, 1), 1, -1, "float32"),
        ((1, 128, 128, 32), 1, -1, "float32"),
        ((2, 208, 208, 2), 2, -1, "float32"),
        ((1, 10007, 4), 1, -1, "float32"),
        ((1, 8, 10007), 8, 1, "float32"),
        ((1, 4, 23, 29, 31), 2, 1, "float32"),
        ((2, 32, 32, 32, 4), 4, -1, "complex64"),
    ],
)
def test_elements_that_round_alike_cost_no_digits(
    shape, num_groups, channel_axis, dtype, mask, placed
):
    """Of equal terms, one long sum would round in one direction, time and again."""
    generator = np.random.default_rng(0)
    alone = value_and_gradient_of(num_groups, mask=mask, channel_axis=channel_axis)

    def value_and_gradient(x, cotangent):
        return alone(placed(x), placed(cotangent))

    for share in (0.02, 0.5):
        x, cotangent = (two_values(generator, share, shape, dtype) for _ in range(2))
        assert_every_group(x, num_groups, value_and_gradient, cotangent, channel_axis)


@pytest.mark.parametrize(
    ("shape", "num_groups", "channel_axis", "dtype"),
    [
        ((1, 64, 64, 64, 8), 1, -1, "float32"),
        ((1, 128, 128, 32), 1, -1, "float32"),
        ((2, 208, 208, 2), 2, -1, "float32"),
        ((1, 8, 10007), 8, 1, "float32"),
        ((2, 32, 32, 32, 4), 4, -1, "complex64"),
    ],
)
def test_elements_that_round_alike_cost_no_digits_under_a_mask(
    shape, num_groups, channel_axis, dtype
):
    test_elements_that_round_alike_cost_no_digits(
        shape, num_groups, channel_axis, dtype, True, on_a_mesh
    )


@pytest.mark.parametrize("placed", [np.asarray, on_a_mesh])
@pytest.mark.parametrize(
    ("shape", "num_groups", "channel_axis"),
    [((1, 64, 64, 64, 8), 1, -1), ((1, 8, 10007), 8, 1), ((1, 2, 208, 208), 2, 1)],
)
def test_the_mean_of_what_a_mask_counts_costs_no_digits(shape, num_groups, channel_axis, placed):
    """A pivot from it is near μ: else x a million deviations from 0 would show."""
    x = random(shape, mean=1e6, deviation=1)
    options = {"channel_axis": channel_axis, "epsilon": 0}
    y = jgn.group_norm(placed(x), num_groups, mask=True, **options)
    wanted = Oracle(x, num_groups, **options).y
    assert np.abs(y - wanted).max() <= 1e-6 * np.abs(wanted).max()


@pytest.mark.parametrize(
    ("sizes", "shape", "num_groups", "channel_axis"),
    [
        ("1, h, w, 32", (1, 128, 128, 32), 1, -1),
        ("n, l, 4", (2, 10007, 4), 4, -1),
        ("n, 8, l", (1, 8, 10007), 8, 1),
        ("n, 8, 3, l", (1, 8, 3, 10007), 8, 1),
        ("n, 4, d, h, w", (2, 4, 23, 29, 31), 2, 1),
    ],
)
def test_elements_that_round_alike_cost_no_digits_of_symbolic_sizes(
    sizes, shape, num_groups, channel_axis
):
    value_and_gradient = exported_for(
        sizes, value_and_gradient_of(num_groups, channel_axis=channel_axis)
    )
    generator = np.random.default_rng(0)
    for share in (0.02, 0.5):
        x, cotangent = (two_values(generator, share, shape) for _ in range(2))
        assert_every_group(x, num_groups, value_and_gradient, cotangent, channel_axis)


@pytest.mark.parametrize(
    ("sizes", "spatial"),
    [
        ("n, l, 4", (16,)),
        ("n, l, 4", (64,)),
        ("n, l, 4", (199,)),
        ("n, h, w, 4", (16, 16)),
        ("n, h, w, 4", (32, 32)),
        ("n, h, 24, 4", (24, 24)),
    ],
)
def test_neither_a_far_element_nor_a_pattern_costs_digits_of_symbolic_sizes(sizes, spatial):
    value_and_gradient = exported_for(sizes, value_and_gradient_of(2))
    places = math.prod(spatial)
    for far in (1e2, 1e4, 1e6):
        x = random((places, places, 4), 0, 0, 1)
        x[range(places), range(places)] = far
        assert_every_group(x.reshape(places, *spatial, 4), 2, value_and_gradient)
    for period, mean in itertools.product((8, 12, 16), (1, 100)):
        assert_every_group(moved_apart(spatial, period, mean), 2, value_and_gradient)


def test_float16_up_to_its_largest():
    x = np.random.default_rng(0).uniform(-65504, 65504, (3, 16, 16, 8)).astype(np.float16)
    x[0, 0, 0] = 65504
    assert_values(jgn.group_norm(x, 2), Oracle(x, 2), "float16", 1024)
    x = (65504 - np.abs(random(x.shape, deviation=100))).astype(np.float16)
    assert_values(jgn.group_norm(x, 2), Oracle(x, 2), "float16", 1024)


def assert_value_and_gradient(x, num_groups, epsilon, bound=None):
    """Relative to the largest: within the rounding of the dtype, or within the bound."""
    cotangent = random(x.shape, 1, 0, 1, x.dtype)
    y, vjp = jax.vjp(jax.jit(lambda x: jgn.group_norm(x, num_groups, epsilon=epsilon)), x)
    oracle = Oracle(x, num_groups, epsilon=epsilon)
    if bound is None:
        bound = unit_roundoff(x.dtype) + promised(x.dtype, x[0].size // num_groups)
    for actual, wanted in ((y, oracle.y), (vjp(cotangent)[0], oracle.gradients(cotangent).x)):
        assert np.abs(wide(actual) - wanted).max() <= bound * np.abs(wanted).max()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("magnitude", "epsilon"),
    [*itertools.product([1e15, 1e-5, 1e-15], [1e-5, 0]), (1e-20, 1e-5)],
)
def test_large_and_small_magnitudes(magnitude, dtype, epsilon):
    x = (random((3, 16, 16, 8)) * magnitude).astype(jnp.dtype(dtype))
    assert_value_and_gradient(x, 2, epsilon)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_without_epsilon_what_has_no_normal_square_gives_bias(dtype):
    x = (random((3, 16, 16, 8)) * 1e-20).astype(jnp.dtype(dtype))
    bias = random((8,), 2, dtype=dtype)
    y, vjp = jax.vjp(lambda x: jgn.group_norm(x, 2, bias=bias, epsilon=0), x)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    chex.assert_tree_all_finite(vjp(y))


@pytest.mark.parametrize("num_groups", [1, 2, 4, 12])
def test_a_mean_whose_square_overflows(num_groups):
    x = random((3, 16, 16, 12), mean=3e19, deviation=1e14)
    assert_value_and_gradient(x, num_groups, 1e-5)


def test_float16_of_every_size_with_its_gradient():
    for size in (6e4, 1, 1e-4, 1e-6):  # The last are denormals.
        x = np.random.default_rng(0).uniform(-size, size, (3, 16, 16, 8)).astype(np.float16)
        assert_value_and_gradient(x, 2, 1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_denormals_are_nothing_beside_epsilon(dtype):
    """Whether a backend keeps them or, as XLA:CPU does, reads them as 0."""
    x = (random((3, 16, 16, 8)) * np.float64(1e-39)).astype(jnp.dtype(dtype))
    bias, cotangent = random((8,), 2, dtype=dtype), random(x.shape, 1, 0, 1, dtype)
    y, vjp = jax.vjp(lambda x: jgn.group_norm(x, 2, bias=bias), x)
    np.testing.assert_array_equal(y, np.broadcast_to(bias, x.shape))
    wanted = Oracle(x, 2).gradients(cotangent).x
    atol = (unit_roundoff(dtype) + tolerance(dtype, 1024)) * np.abs(wanted).max()
    np.testing.assert_allclose(wide(vjp(cotangent)[0]), wanted, rtol=0, atol=atol)
    chex.assert_tree_all_finite(jgn.group_norm(x, 2, epsilon=0))


# Blocks that divide the positions; a prime number of them, whose blocks are padded; and two primes
# for each of two devices, of which there are no blocks: a plain sum.
@pytest.mark.parametrize(
    ("shape", "channel_axis", "placed"),
    [
        ((1, 2**20, 16), -1, np.asarray),
        ((1, 1048573, 16), -1, np.asarray),
        ((1, 4, 2 * 1021, 2 * 1031), 1, on_a_mesh),
    ],
)
def test_a_group_of_millions_of_elements(shape, channel_axis, placed):
    x = np.random.default_rng(2).standard_normal(shape, np.float32) + np.float32(3)
    cotangent = np.random.default_rng(3).standard_normal(shape, np.float32)
    value_and_gradient = value_and_gradient_of(1, channel_axis=channel_axis)
    oracle = Oracle(x, 1, channel_axis=channel_axis)
    wanted = oracle.y, oracle.gradients(cotangent).x
    for actual, expected in zip(value_and_gradient(placed(x), cotangent), wanted, strict=True):
        assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max()
