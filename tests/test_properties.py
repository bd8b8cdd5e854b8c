"""Whatever the input: values and gradients equal the oracle's, and bad input is told as documented.

HYPOTHESIS_PROFILE=campaign runs a hundred times as many examples.
"""

import itertools
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import batch_shape, on_a_mesh
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracle import Oracle, tolerance, unit_roundoff, wide

import jgn

EXAMPLES = 25
settings.register_profile(
    "suite",
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.register_profile(
    "campaign", parent=settings.get_profile("suite"), max_examples=100 * EXAMPLES
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


@st.composite
def calls(draw, channels_last=False):
    """x, its number of groups and the other arguments of a call in the documented domain."""
    rank = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 9 if rank < 5 else 4), min_size=rank, max_size=rank))
    channel = rank - 1 if channels_last else draw(st.integers(0, rank - 1))
    options = {"channel_axis": draw(st.sampled_from([channel, channel - rank]))}
    if draw(st.booleans()) or (channels_last and rank == 1):
        others = [axis for axis in range(rank) if axis != channel]
        reduced = [axis for axis in others if draw(st.booleans())] + [channel]
        options["reduction_axes"] = tuple(draw(st.permutations(reduced)))
    size = sizes[channel]
    num_groups = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    dtype = draw(st.sampled_from(["float16", "bfloat16", "float32"]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = generator.normal(draw(st.sampled_from([0, 1, 30])), 1, sizes).astype(jnp.dtype(dtype))
    rows = (*batch_shape(tuple(sizes), **options), size)
    for name in ("scale", "bias"):
        owners = draw(st.sampled_from([None, (size,), rows]))
        options[name] = None if owners is None else generator.normal(1, 1, owners).astype("float32")
    if draw(st.booleans()):
        kept = sizes[draw(st.integers(0, rank)) :]
        shape = [draw(st.sampled_from([1, size])) for size in kept]
        options["mask"] = generator.random(shape) < draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    options["epsilon"] = draw(st.sampled_from([1e-5, 1e-3, 0.1, 1.0]))
    return x, num_groups, options


@given(calls(), st.sampled_from([np.asarray, on_a_mesh]))
def test_values_and_gradients_equal_the_oracles(call, placed):
    x, num_groups, options = call
    scale, bias = options.pop("scale"), options.pop("bias")
    cotangent = np.random.default_rng(x.size).normal(size=x.shape).astype(x.dtype)

    @jax.jit
    def value_and_gradient(x, cotangent):
        def normalized(x):
            return jgn.group_norm(x, num_groups, scale, bias, **options)

        y, vjp = jax.vjp(normalized, x)
        return y, vjp(cotangent)[0]

    y, gradient = value_and_gradient(placed(x), cotangent)
    assert (y.shape, y.dtype, gradient.dtype) == (x.shape, x.dtype, x.dtype)
    oracle = Oracle(x, num_groups, scale, bias, **options)
    # What rounds is d, relative to its group's pivot, times 1/√(σ² + ε): under a mask d may be
    # large beside the deviation of what counts.
    deviations = np.abs(wide(x)).max() * oracle.inverse_deviation
    largest = 1 if scale is None else np.abs(scale).max()
    size = largest * np.minimum(np.abs(oracle.y / largest).max() + 1, deviations.max() + 1)
    size = size + (0 if bias is None else np.abs(bias).max())
    rounding = unit_roundoff(x.dtype)
    np.testing.assert_allclose(
        wide(y), oracle.y, rtol=rounding, atol=2 * tolerance(x.dtype, x.size) * size
    )
    wanted = oracle.gradients(cotangent).x
    terms = oracle.gradient_terms(cotangent) * (1 + np.abs(oracle.y).max())
    np.testing.assert_allclose(
        wide(gradient), wanted, rtol=rounding, atol=2 * tolerance(x.dtype, x.size) * terms
    )


@given(calls(), st.sampled_from([0.25, 2.0, 1024.0]), st.sampled_from([-7, 1, 20]))
def test_scaling_and_shifting_x_changes_nothing_without_epsilon(call, factor, shift):
    x, num_groups, options = call
    options["epsilon"] = 0
    x = (np.round(8 * x.astype(np.float32)) / 8).astype(np.float32)  # so that x + shift is exact
    y = np.asarray(jgn.group_norm(x, num_groups, **options))
    scaled = jgn.group_norm(np.float32(factor) * x, num_groups, **options)
    np.testing.assert_array_equal(scaled, y, err_msg="powers of two scale without rounding")
    shifted = jgn.group_norm(x + np.float32(shift), num_groups, **options)
    atol = 4 * tolerance("float32", x.size) * (1 + np.abs(y).max())
    np.testing.assert_allclose(shifted, y, rtol=0, atol=atol)


@given(calls(channels_last=True), st.randoms(use_true_random=False))
def test_positions_may_be_permuted_and_samples_and_groups_are_independent(call, random):
    x, num_groups, options = call
    options.pop("mask", None)
    x = x.astype(np.float32)
    y = np.asarray(jgn.group_norm(x, num_groups, **options))
    reduced = {axis % x.ndim for axis in options.get("reduction_axes", range(1, x.ndim))}
    spatial = sorted(reduced - {x.ndim - 1})
    atol = 4 * tolerance("float32", x.size) * (1 + np.abs(y).max())
    if spatial:
        axis = random.choice(spatial)
        order = random.sample(range(x.shape[axis]), x.shape[axis])
        permuted = jgn.group_norm(np.take(x, order, axis), num_groups, **options)
        np.testing.assert_allclose(permuted, np.take(y, order, axis), rtol=0, atol=atol)
    other = x.copy()
    other[..., : x.shape[-1] // num_groups] = -3 * other[..., : x.shape[-1] // num_groups] + 1
    changed = np.asarray(jgn.group_norm(other, num_groups, **options))
    rest = slice(x.shape[-1] // num_groups, None)
    np.testing.assert_array_equal(changed[..., rest], y[..., rest])


X = np.ones((2, 3, 12), np.float32)
# Each breaks one rule of the documented domain; the beginning of what is answered beside it.
BROKEN = {
    "num_groups": (
        [5, 7, 8, 9, 10, 11, 13, 24, 32, 1000, 0, -1, -12],
        ValueError,
        "num_groups must ",
    ),
    "num_groups ": ([2.0, "3", None, True, [4], (1,), 1j, b"4"], TypeError, "num_groups must "),
    "channel_axis": ([3, 4, -4, 100, -100], ValueError, "channel_axis must "),
    "channel_axis ": ([0.5, "last", None, [1]], TypeError, "channel_axis must "),
    "reduction_axes": (
        [(), (0,), (0, 1), 1, (2, 2), (2, -1), (3,), (-4, 2), [1, 1, 2]],
        ValueError,
        "reduction_axes must ",
    ),
    "reduction_axes ": ([(2, 1.5), "axes", ("1", 2), (None, 2)], TypeError, "reduction_axes must "),
    "epsilon": (
        [-1e-9, -1, float("nan"), float("inf"), -float("inf")],
        ValueError,
        "epsilon must ",
    ),
    "epsilon ": (["small", None, [1], 1j], TypeError, "epsilon must "),
    "mask ": ([np.ones(12), np.ones((2, 3, 12), int), "mask", 1.0], TypeError, "mask must "),
    "dtype ": (["int32", "bool", jnp.uint8], TypeError, "dtype must "),
    "activation ": (["silu", 3, X], TypeError, "activation must "),
    "x ": (
        ["text", None, object(), np.array(["a"]), np.array([None]), {}, jnp.float8_e5m2(1)],
        TypeError,
        "x must ",
    ),
}
NO_SCALE = [(), (1,), (11,), (13,), (3, 12), (1, 12), (12, 1), (2, 3, 12), (2, 6), (24,)]
NO_MASK = [(2,), (11,), (2, 12), (2, 3), (3, 3, 12), (2, 2, 12), (1, 2, 3, 12), (0,), (2, 3, 0)]
GOOD = [
    {"num_groups": num_groups, "epsilon": epsilon, "activation": activation, "dtype": dtype}
    for num_groups in (1, 2, 3, 4, 6, 12)
    for epsilon in (0, 1e-6, 1e-5, 1e-3, 1, np.float32(0.1), 2)
    for activation in (None, jax.nn.silu, jnp.tanh)
    for dtype in (None, "float32", "bfloat16", jnp.float16)
]


def bad_calls():
    for name, (values, error, text) in BROKEN.items():
        for value, good in itertools.product(values, GOOD[::4]):
            yield {**good, name.strip(): value}, error, text
    for name, (shapes, kind) in {
        "scale": (NO_SCALE, "float32"),
        "bias": (NO_SCALE, "float16"),
        "mask": (NO_MASK, bool),
    }.items():
        for shape, good in itertools.product(shapes, GOOD[::4]):
            yield {**good, name: np.ones(shape, kind)}, ValueError, f"{name} must "


def test_ten_thousand_bad_calls_are_answered_and_none_computes():
    tried = 0

    def must_not_compute(*_, **__):
        pytest.fail("it was traced")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jgn._group_norm._group_norm", must_not_compute)
        for arguments, error, text in bad_calls():
            arguments = {"x": X, **arguments}
            with pytest.raises(error, match=f"^{re.escape(text)}"):
                jgn.group_norm(**arguments)
            tried += 1
    assert tried >= 10_000
