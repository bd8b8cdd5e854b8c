"""Whatever the input: values and gradients equal the oracle's.

HYPOTHESIS_PROFILE=campaign runs a hundred times as many examples.
"""

import itertools
import os

import jax
import jax.numpy as jnp
import numpy as np
from cases import batch_shape, members, on_a_mesh, random, value_and_gradient_of
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from oracle import Oracle, promised, tolerance, unit_roundoff, wide

import jgn
from jgn._axes import resolve_axes

EXAMPLES = 25
settings.register_profile(
    "suite",
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile(
    "campaign", parent=settings.get_profile("suite"), max_examples=100 * EXAMPLES
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def silu(y):
    sigmoid = (1 + np.tanh(y / 2)) / 2
    return y * sigmoid, sigmoid * (1 + y * (1 - sigmoid))


# What jgn applies, and its value and derivative in float64.
ACTIVATIONS = {
    "none": (None, lambda y: (y, 1)),
    "silu": (jax.nn.silu, silu),
    "tanh": (jnp.tanh, lambda y: (np.tanh(y), 1 - np.tanh(y) ** 2)),
}
DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
PLACED = st.sampled_from([np.asarray, on_a_mesh])
# Linux maps 65,530 areas of memory for a process, and programs that JAX keeps take some each.
EXAMPLES_KEPT = 100
example_numbers = itertools.count(1)


@st.composite
def calls(draw, dtypes=DTYPES):
    """x, its number of groups and the other arguments of a call in the documented domain."""
    if next(example_numbers) % EXAMPLES_KEPT == 0:
        jax.clear_caches()
    rank = draw(st.integers(1, 6))
    size = st.integers(draw(st.sampled_from([1, 1, 1, 0])), 9 if rank < 5 else 4)
    sizes = draw(st.lists(size, min_size=rank, max_size=rank))
    channel = draw(st.integers(0, rank - 1))
    sizes[channel] = max(sizes[channel], 1)
    if rank in (2, 3, 4) and draw(st.booleans()):  # Blocks of blocks; padded; with a stride.
        axis = draw(st.sampled_from([axis for axis in range(rank) if axis != channel]))
        sizes[axis] = draw(st.sampled_from([40, 131, 320, 640]))
    options = {"channel_axis": draw(st.sampled_from([channel, channel - rank]))}
    if draw(st.booleans()):
        others = [axis for axis in range(rank) if axis != channel]
        reduced = [axis for axis in others if draw(st.booleans())] + [channel]
        options["reduction_axes"] = tuple(draw(st.permutations(reduced)))
    size = sizes[channel]
    num_groups = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    seed = draw(st.integers(0, 2**32 - 1))
    generator = np.random.default_rng(seed)
    x = random(sizes, seed, draw(st.sampled_from([0, 1, 30])), 1, draw(st.sampled_from(dtypes)))
    share = draw(st.sampled_from([None, None, 0.02, 0.5]))
    if share and x.size:  # Two values: terms of a sum that are equal round alike.
        x = np.where(generator.random(sizes) < share, *generator.choice(x.reshape(-1), 2))
    rows = (*batch_shape(tuple(sizes), **options), size)
    for name in ("scale", "bias"):
        owners = draw(st.sampled_from([None, (size,), rows]))
        options[name] = None if owners is None else generator.normal(1, 1, owners).astype("float32")
    if draw(st.booleans()):
        kept = sizes[draw(st.integers(0, rank)) :]
        shape = [draw(st.sampled_from([1, size])) for size in kept]
        options["mask"] = generator.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    options["epsilon"] = draw(st.sampled_from([0, 1e-5, 1e-3, 0.1, 1.0]))
    return x, num_groups, options


def output_size(x, scale, bias, oracle):
    """What the rounding of an output grows with.

    What rounds is d, relative to its group's pivot, times 1/√(σ² + ε): under a mask d may be large
    beside the deviation of what counts.
    """
    deviations = oracle.largest(x) * oracle.inverse_deviation
    largest = 1 if scale is None else np.abs(scale).max()
    size = largest * np.minimum(oracle.largest(oracle.y / largest) + 1, deviations + 1)
    return size + (0 if bias is None else np.abs(bias).max())


def assert_close(actual, wanted, error):
    """Within one rounding of the result, and this error."""
    wanted = wanted if np.iscomplexobj(actual) else wanted.real
    allowed = unit_roundoff(actual.dtype) * np.abs(wanted) + error
    excess = np.abs(wide(actual) - wanted) - allowed
    assert excess.max() <= 0, f"{excess.max()} beyond what rounding explains"


# The mean of two numbers that are 100 deviations from 0, where an oracle in float64 has the error.
TWO_FAR_FROM_0 = (
    random((2,), 0, 30, 1, "float64"),
    1,
    {"channel_axis": 0, "scale": None, "bias": None, "epsilon": 0},
)


@example(TWO_FAR_FROM_0, "none", np.asarray)
@given(calls(), st.sampled_from(sorted(ACTIVATIONS)), PLACED)
def test_values_and_gradients_equal_the_oracles(call, name, placed):
    x, num_groups, options = call
    parameters = {name: options.pop(name) for name in ("scale", "bias")}
    given_parameters = {name: p for name, p in parameters.items() if p is not None}
    activation, in_float64 = ACTIVATIONS["none" if np.iscomplexobj(x) else name]
    cotangent = random(x.shape, x.size, 0, 1, x.dtype)

    @jax.jit
    def value_and_gradients(x, parameters, cotangent):
        def normalized(x, parameters):
            return jgn.group_norm(x, num_groups, **parameters, activation=activation, **options)

        y, vjp = jax.vjp(normalized, x, parameters)
        return y, *vjp(cotangent)

    with jax.enable_x64(x.dtype in ("float64", "complex128")):
        results = value_and_gradients(placed(x), given_parameters, cotangent)
        y, gradient, totals = jax.device_get(results)
    assert (y.shape, y.dtype) == (gradient.shape, gradient.dtype) == (x.shape, x.dtype)
    assert {name: (t.shape, t.dtype) for name, t in totals.items()} == {
        name: (p.shape, p.dtype) for name, p in given_parameters.items()
    }
    if x.size == 0:
        assert not any(total.any() for total in totals.values())
        return
    oracle = Oracle(x, num_groups, **parameters, **options)
    size = output_size(x, **parameters, oracle=oracle)
    value, derivative = in_float64(oracle.y)
    of_a_group = promised(x.dtype, x.size)
    assert_close(y, value, of_a_group * size)
    wanted = oracle.gradients(derivative * wide(cotangent))
    terms = oracle.gradient_terms(cotangent) * (1 + oracle.largest(oracle.y))
    assert_close(gradient, wanted.x, of_a_group * terms)
    for name, total in totals.items():
        # Σ|cotangent| over all that share it, and what a rounded y or (x − μ)/σ adds.
        terms = np.abs(wide(cotangent)) * (1 + (size if activation else 0))
        if name == "scale":
            terms = terms * (1 + oracle.largest(x) * oracle.inverse_deviation)
        summed = Oracle(x, num_groups, None, total, **options).gradients(terms).bias
        assert_close(total, getattr(wanted, name), tolerance(x.dtype, x.size) * summed)


@given(calls(["float32"]), st.sampled_from([0.25, 2.0, 1024.0]), st.sampled_from([-7, 1, 20]))
def test_scaling_and_shifting_x_changes_nothing_without_epsilon(call, factor, shift):
    x, num_groups, options = call
    options["epsilon"] = 0
    x = (np.round(8 * x) / 8).astype(np.float32)  # so that x + shift is exact
    y = np.asarray(jgn.group_norm(x, num_groups, **options))
    scaled = jgn.group_norm(np.float32(factor) * x, num_groups, **options)
    np.testing.assert_array_equal(scaled, y, err_msg="powers of two scale without rounding")
    shifted = jgn.group_norm(x + np.float32(shift), num_groups, **options)
    atol = 4 * tolerance("float32", x.size) * (1 + np.abs(y).max(initial=0))
    np.testing.assert_allclose(shifted, y, rtol=0, atol=atol)


@given(calls(["float32"]), st.randoms(use_true_random=False))
def test_positions_and_the_channels_of_a_group_may_be_permuted(call, generator):
    x, num_groups, options = call
    axes = resolve_axes(x.ndim, options["channel_axis"], options.get("reduction_axes"))
    if "mask" in options:
        options["mask"] = np.broadcast_to(options["mask"], x.shape)
    y = np.asarray(jgn.group_norm(x, num_groups, **options))
    if not x.size:
        return
    oracle = Oracle(x, num_groups, **options)
    size = output_size(x, options["scale"], options["bias"], oracle)
    for axis in (*axes.spatial, axes.channel):
        groups = num_groups if axis == axes.channel else 1
        order = np.arange(x.shape[axis]).reshape(groups, -1)
        order = np.concatenate([generator.sample(list(part), len(part)) for part in order])
        permuted = {**options}
        if "mask" in options:
            permuted["mask"] = np.take(options["mask"], order, axis)
        if axis == axes.channel:
            for name in ("scale", "bias"):
                if options[name] is not None:
                    permuted[name] = np.take(options[name], order, -1)
        actual = jgn.group_norm(np.take(x, order, axis), num_groups, **permuted)
        error = 2 * promised("float32", x.size) * size  # Of both calls.
        assert_close(actual, np.take(wide(y), order, axis), np.take(error, order, axis))


@given(calls(), st.randoms(use_true_random=False))
def test_samples_and_groups_are_independent(call, generator):
    x, num_groups, options = call
    assume(x.size)
    where = {name: options.get(name) for name in ("channel_axis", "reduction_axes")}
    group_of = members(x.shape, num_groups, **where)
    own = group_of == generator.choice(np.unique(group_of).tolist())
    assume(not own.all())
    with jax.enable_x64(x.dtype in ("float64", "complex128")):
        function = value_and_gradient_of(num_groups, **options)
        cotangent = random(x.shape, 1, 0, 1, x.dtype)
        clean = function(x, cotangent)
        changed = function(
            np.where(own, x[::-1] * x.dtype.type(-3), x), np.where(own, -cotangent, cotangent)
        )
    for actual, expected in zip(changed, clean, strict=True):
        np.testing.assert_array_equal(np.asarray(actual)[~own], np.asarray(expected)[~own])


@given(calls(), st.sampled_from([np.nan, np.inf, -np.inf, 1e4]))
def test_what_a_mask_leaves_out_is_irrelevant(call, junk):
    x, num_groups, options = call
    mask = np.broadcast_to(options.get("mask", True), x.shape)
    assume(0 < mask.sum() < mask.size)
    cotangent = np.where(mask, random(x.shape, 1, 0, 1, x.dtype), 0).astype(x.dtype)
    with jax.enable_x64(x.dtype in ("float64", "complex128")):
        function = value_and_gradient_of(num_groups, **options)
        clean = function(np.where(mask, x, 0).astype(x.dtype), cotangent)
        dirty = function(np.where(mask, x, junk).astype(x.dtype), cotangent)
    for actual, expected in zip(dirty, clean, strict=True):
        np.testing.assert_array_equal(np.asarray(actual)[mask], np.asarray(expected)[mask])
