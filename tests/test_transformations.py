"""Every JAX transformation gives what the plain call gives, values and derivatives."""

import subprocess
import sys
import textwrap

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from jax import export, lax
from jax.experimental import checkify

import jgn

SHAPE, GROUPS = (4, 16, 6, 8), 2  # On a CPU blocks of 16, on a GPU parts of 32.
X = jnp.asarray(np.random.default_rng(0).normal(1, 2, SHAPE), jnp.float32)
TANGENT = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)
SCALE = jnp.linspace(0.5, 2, SHAPE[-1])
BIAS = jnp.linspace(-1, 1, SHAPE[-1])
pytestmark = pytest.mark.usefixtures("backend")
# A few roundings of values up to about 10, in another order of summation.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def norm(x, scale=SCALE, bias=BIAS, **options):
    return jgn.group_norm(x, GROUPS, scale, bias, **options)


def one_sample(x, scale=SCALE, bias=BIAS):
    return norm(x, scale, bias, reduction_axes=(0, 1, 2))


def loss(x, scale=SCALE, bias=BIAS):
    return (norm(x, scale, bias) ** 3).sum()


def test_vmap_over_samples():
    chex.assert_trees_all_close(jax.vmap(one_sample)(X), norm(X), **CLOSE)
    gradient = jax.grad(lambda x: (jax.vmap(one_sample)(x) ** 3).sum())(X)
    chex.assert_trees_all_close(gradient, jax.grad(loss)(X), **CLOSE)


def test_nested_vmap_over_frames_of_videos():
    video = X.reshape(2, 2, *SHAPE[1:])
    y = jax.vmap(jax.vmap(one_sample))(video)
    chex.assert_trees_all_close(y, norm(video, reduction_axes=(2, 3, 4)), **CLOSE)
    chex.assert_trees_all_close(y.reshape(SHAPE), norm(X), **CLOSE)
    gradient = jax.grad(lambda video: (jax.vmap(jax.vmap(one_sample))(video) ** 3).sum())(video)
    chex.assert_trees_all_close(gradient.reshape(SHAPE), jax.grad(loss)(X), **CLOSE)


def test_vmap_over_an_ensemble_of_parameters():
    scales, biases = jnp.stack([SCALE, 2 * SCALE, -SCALE]), jnp.stack([BIAS, BIAS, 0 * BIAS])
    y = jax.vmap(norm, (None, 0, 0))(X, scales, biases)
    chex.assert_trees_all_close(y[1], norm(X, scales[1], biases[1]), **CLOSE)
    gradients = jax.vmap(jax.grad(loss, (1, 2)), (None, 0, 0))(X, scales, biases)
    expected = jax.grad(loss, (1, 2))(X, scales[2], biases[2])
    chex.assert_trees_all_close(jax.tree.map(lambda g: g[2], gradients), expected, rtol=1e-4)


def test_gradients_of_each_sample():
    per_sample = jax.vmap(jax.grad(lambda scale, x: (one_sample(x, scale) ** 3).sum()), (None, 0))(
        SCALE, X
    )
    expected = [jax.grad(loss, 1)(X[i : i + 1], SCALE) for i in range(len(X))]
    chex.assert_trees_all_close(per_sample, jnp.stack(expected), rtol=1e-4)


def test_value_and_grad_jvp_and_linearize_agree():
    value, gradient = jax.value_and_grad(loss)(X)
    same_value, derivative = jax.jvp(loss, (X,), (TANGENT,))
    linear_value, linear = jax.linearize(loss, X)
    chex.assert_trees_all_close(same_value, value, rtol=1e-5)
    chex.assert_trees_all_close(linear_value, value, rtol=1e-5)
    chex.assert_trees_all_close(derivative, jnp.vdot(gradient, TANGENT), rtol=1e-4)
    chex.assert_trees_all_close(linear(TANGENT), derivative, rtol=1e-4)


def test_hessian_vector_products_agree_in_every_mode():
    def forward_over_reverse(x, v):
        return jax.jvp(jax.grad(loss), (x,), (v,))[1]

    def reverse_over_forward(x, v):
        return jax.grad(lambda x: jax.jvp(loss, (x,), (v,))[1])(x)

    def reverse_over_reverse(x, v):
        return jax.grad(lambda x: jnp.vdot(jax.grad(loss)(x), v))(x)

    wanted = forward_over_reverse(X, TANGENT)
    scale = {"rtol": 0, "atol": 1e-5 * float(jnp.abs(wanted).max())}
    chex.assert_trees_all_close(reverse_over_forward(X, TANGENT), wanted, **scale)
    chex.assert_trees_all_close(reverse_over_reverse(X, TANGENT), wanted, **scale)
    small = X[:1, :2, :1]
    hessian = jax.hessian(loss)(small).reshape(small.size, small.size)
    product = (hessian @ TANGENT[:1, :2, :1].ravel()).reshape(small.shape)
    wanted = forward_over_reverse(small, TANGENT[:1, :2, :1])
    chex.assert_trees_all_close(product, wanted, rtol=0, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_checkpoint_around_it():
    value, gradient = jax.value_and_grad(lambda x: jax.checkpoint(loss)(x))(X)
    chex.assert_trees_all_close(value, loss(X), rtol=1e-5)
    chex.assert_trees_all_close(gradient, jax.grad(loss)(X), **CLOSE)


POLICIES = jax.checkpoint_policies


@pytest.mark.parametrize(
    "policy",
    [
        POLICIES.everything_saveable,
        POLICIES.dots_saveable,
        POLICIES.save_only_these_names("group_norm_moments", "group_norm_sums"),
    ],
)
def test_checkpoint_around_it_whatever_it_saves(policy):
    saving = jax.checkpoint(loss, policy=policy)
    gradients = jax.grad(saving, (0, 1, 2))(X, SCALE, BIAS)
    chex.assert_trees_all_close(gradients, jax.grad(loss, (0, 1, 2))(X, SCALE, BIAS), **CLOSE)


@pytest.mark.parametrize("errors", [checkify.user_checks, checkify.float_checks])
def test_checkify_finds_what_it_looks_for(errors):
    def checked(x):
        checkify.check((x < 1e3).all(), "an x of 1,000 or more")
        return norm(x)

    error, y = checkify.checkify(checked, errors=errors)(X)
    error.throw()
    chex.assert_trees_all_close(y, norm(X), **CLOSE)
    error, _ = checkify.checkify(checked, errors=errors)(X.at[0].set(jnp.inf))
    assert error.get()


def test_scan_over_layers():
    scales = jnp.stack([SCALE, SCALE + 0.5, SCALE - 0.25])

    def scanned(x, scales):
        return lax.scan(lambda x, scale: (norm(x, scale) + x, None), x, scales)[0]

    def unrolled(x, scales):
        for scale in scales:
            x = norm(x, scale) + x
        return x

    chex.assert_trees_all_close(scanned(X, scales), unrolled(X, scales), **CLOSE)

    def gradients(f):
        return jax.grad(lambda x, scales: (f(x, scales) ** 2).sum(), (0, 1))(X, scales)

    chex.assert_trees_all_close(gradients(scanned), gradients(unrolled), rtol=1e-4, atol=1e-4)


def test_nn_scan_over_layers():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + jgn.GroupNorm(GROUPS, activation=nn.silu)(x), None

    layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    variables = layers.init(jax.random.key(0), X, None)
    chex.assert_shape(variables["params"]["GroupNorm_0"]["scale"], (3, SHAPE[-1]))

    def unrolled(x):
        for _ in range(3):
            x = x + jax.nn.silu(norm(x, None, None))
        return x

    def scanned(x):
        return layers.apply(variables, x, None)[0]

    chex.assert_trees_all_close(scanned(X), unrolled(X), **CLOSE)
    chex.assert_trees_all_close(
        jax.grad(lambda x: (scanned(x) ** 2).sum())(X),
        jax.grad(lambda x: (unrolled(x) ** 2).sum())(X),
        rtol=1e-4,
        atol=1e-4,
    )


def test_eval_shape_computes_nothing():
    shape = jax.ShapeDtypeStruct((1 << 20, 1 << 10, 1 << 10, 64), jnp.bfloat16)
    result = jax.eval_shape(lambda x: jgn.group_norm(x, 32, activation=jax.nn.silu), shape)
    assert (result.shape, result.dtype) == (shape.shape, shape.dtype)


def test_a_donated_input_becomes_the_output():
    compiled = jax.jit(lambda x: norm(x), donate_argnums=0).lower(X).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == X.nbytes
    donated = jnp.array(X)
    expected = norm(X)
    chex.assert_trees_all_close(compiled(donated), expected, **CLOSE)
    assert donated.is_deleted()
    gradient = jax.jit(jax.grad(loss), donate_argnums=0)(jnp.array(X))
    chex.assert_trees_all_close(gradient, jax.grad(loss)(X), **CLOSE)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("jax_disable_jit", True),
        ("jax_enable_x64", True),
        ("jax_debug_nans", True),
        ("jax_numpy_dtype_promotion", "standard"),
        ("jax_numpy_rank_promotion", "raise"),
        ("jax_check_tracer_leaks", True),
    ],
)
def test_under_every_configuration(name, value):
    mask = jnp.arange(SHAPE[1]).reshape(1, -1, 1, 1) < 9

    def both(x):
        def plain_and_masked(x):
            return norm(x, activation=jax.nn.silu) + norm(x, mask=mask)

        return jax.value_and_grad(lambda x: plain_and_masked(x).sum())(x)

    expected = both(X)
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        actual = both(X)
        integers = jgn.group_norm(jnp.arange(8).reshape(1, 8), 2)
    finally:
        jax.config.update(name, before)
    chex.assert_trees_all_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert integers.dtype == (jnp.float64 if name == "jax_enable_x64" else jnp.float32)


def test_debug_nans_sees_none_under_the_mask():
    """Nor where an eager derivative turns x into an array."""
    mask = (jnp.arange(6) < 4)[:, None]
    x = jnp.where(mask, X, jnp.nan)
    with jax.debug_nans(True):
        gradient = jax.grad(lambda x: norm(x, mask=mask).sum())(x)
    assert np.isfinite(gradient).all()


LOAD = """
    import sys
    import numpy as np
    from jax import export

    function = export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
    for batch, height, width in [(1, 1, 1), (2, 5, 6), (3, 200, 7)]:
        x = np.random.default_rng(0).normal(3, 2, (batch, height, width, 8)).astype(np.float32)
        groups = x.reshape(batch, -1, 2, 4).astype(np.float64)
        mean, variance = (m(groups, axis=(1, 3), keepdims=True) for m in (np.mean, np.var))
        wanted = ((groups - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape)
        np.testing.assert_allclose(function.call(x), wanted, atol=1e-5)
    assert not {"jgn", "flax"} & set(sys.modules), "the exported function needs neither"
"""


def test_an_export_with_symbolic_sizes_needs_neither_jgn_nor_flax(tmp_path):
    pytest.importorskip("flatbuffers")
    batch, height, width = export.symbolic_shape("batch, height, width")
    shape = jax.ShapeDtypeStruct((batch, height, width, 8), jnp.float32)
    platforms = ["cpu", "cuda", "tpu"]
    function = jax.jit(lambda x: jgn.group_norm(x, GROUPS))
    exported = export.export(function, platforms=platforms)(shape)
    path = tmp_path / "group_norm"
    path.write_bytes(exported.serialize())
    subprocess.run([sys.executable, "-c", textwrap.dedent(LOAD), path], check=True, cwd=tmp_path)


@pytest.mark.parametrize("cut", [slice(1, None), slice(1, -1)])
def test_a_symbolic_size_may_be_none(cut):
    """As after a convolution without padding: h - 1 or max(h - 2, 0)."""
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("n, h, 3, 8"), jnp.float32)
    y_and_gradient = jax.jit(jax.value_and_grad(lambda x: (norm(x[:, cut]) ** 3).sum()))
    exported = export.export(y_and_gradient)(shape)
    for height in (2, 3, 9):
        x = jnp.asarray(random((2, height, 3, 8)))
        chex.assert_trees_all_close(exported.call(x), y_and_gradient(x), **CLOSE)


def test_large_groups_may_have_symbolic_sizes():
    """Their channels are added lane by lane, along with positions if these are known to be few."""
    channels = 32 * GROUPS
    shape = jax.ShapeDtypeStruct(export.symbolic_shape(f"n, h, w, {channels}"), jnp.float32)
    normalized = jax.jit(lambda x: jgn.group_norm(x, GROUPS))
    exported = export.export(normalized)(shape)
    for height, width in ((1, 1), (2, 3), (16, 9)):
        x = jnp.asarray(random((2, height, width, channels)))
        chex.assert_trees_all_close(exported.call(x), normalized(x), **CLOSE)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_it_lowers_for_every_platform(platform):
    def value_and_gradients(x, scale, bias):
        return jax.value_and_grad(loss, (0, 1, 2))(x, scale, bias)

    exported = export.export(jax.jit(value_and_gradients), platforms=[platform])(X, SCALE, BIAS)
    assert exported.platforms == (platform,)
