"""The flax.nnx layer: flax.nnx.GroupNorm's parameters and state, under nnx's transformations."""

import functools
import subprocess
import sys

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import random
from flax import nnx
from jax.sharding import AxisType, PartitionSpec
from oracle import Oracle, tolerance

import jgn
import jgn.nnx

SHAPE, GROUPS = (3, 6, 5, 8), 4
CHANNELS = SHAPE[-1]
X, SCALE, BIAS = random(SHAPE), random((CHANNELS,), 1), random((CHANNELS,), 2)


def layer(**options):
    return jgn.nnx.GroupNorm(CHANNELS, **{"num_groups": GROUPS, "rngs": nnx.Rngs(0), **options})


def with_parameters(module):
    nnx.update(module, {"scale": jnp.asarray(SCALE), "bias": jnp.asarray(BIAS)})
    return module


def assert_close(actual, wanted, elements=60):
    atol = tolerance("float32", elements) * np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


def gradient_of_squares(function, *arguments):
    return nnx.grad(lambda *arguments: (function(*arguments) ** 2).sum())(*arguments)


def test_importing_jgn_does_not_import_nnx():
    code = "import sys, jgn; print([m for m in sys.modules if m in ('jgn.nnx', 'flax.nnx')])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.stdout, result.returncode) == ("[]\n", 0), result.stderr


# The state


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_groups": None, "group_size": 2},
        {"use_bias": False},
        {"use_scale": False},
        {"use_scale": False, "use_bias": False},
        {"param_dtype": jnp.bfloat16},
        {"scale_init": nnx.initializers.normal(), "bias_init": nnx.initializers.uniform()},
        {"scale_metadata": {"role": "gain"}, "bias_metadata": {"role": "offset"}},
    ],
    ids=lambda options: "-".join(options) or "default",
)
def test_the_state_is_that_of_flax(options):
    options = {"num_features": CHANNELS, "num_groups": GROUPS, **options}
    ours = nnx.state(jgn.nnx.GroupNorm(**options, rngs=nnx.Rngs(0)))
    theirs = nnx.state(nnx.GroupNorm(**options, rngs=nnx.Rngs(0)))
    chex.assert_trees_all_equal_dtypes(nnx.to_pure_dict(ours), nnx.to_pure_dict(theirs))
    chex.assert_trees_all_equal(nnx.to_pure_dict(ours), nnx.to_pure_dict(theirs))
    for name in ours:
        assert isinstance(ours[name], nnx.Param)
        assert ours[name].get_metadata() == theirs[name].get_metadata()


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
@pytest.mark.parametrize("groups", [{"num_groups": 4}, {"num_groups": None, "group_size": 4}])
def test_a_state_of_flax_gives_the_same_output_for_the_same_epsilon(epsilon, groups):
    theirs = with_parameters(nnx.GroupNorm(CHANNELS, **groups, epsilon=epsilon, rngs=nnx.Rngs(1)))
    ours = layer(**groups, epsilon=epsilon)
    nnx.update(ours, nnx.state(theirs))
    chex.assert_trees_all_equal(ours.scale[...], SCALE)
    # flax's own rounding: E[x²] − E[x]² loses (μ/σ)² more.
    assert_close(ours(X), theirs(X), elements=120)


def test_the_default_epsilon_is_that_of_the_equation():
    x = X / 1000
    assert_close(layer()(x), Oracle(x, GROUPS).y)


def test_by_default_there_are_as_many_groups_as_flax_has():
    ours, theirs = (kind(96, rngs=nnx.Rngs(0)) for kind in (jgn.nnx.GroupNorm, nnx.GroupNorm))
    assert (ours.num_groups, ours.group_size) == (theirs.num_groups, 3)


@pytest.mark.parametrize("reduction_axes", [[1, 2, 3], np.array([1, 2, 3])], ids=type)
def test_split_and_merge_give_the_same_layer(reduction_axes):
    module = with_parameters(
        layer(
            activation=nnx.silu,
            reduction_axes=reduction_axes,
            axis_name=["device"],
            axis_index_groups=[[0], [1]],
            channel_axis=-1,
        )
    )
    graphdef, state = nnx.split(module)
    assert graphdef == nnx.split(module)[0]
    assert hash(graphdef) == hash(nnx.split(module)[0])
    merged = nnx.merge(graphdef, state)
    for name, value in vars(module).items():
        if name not in ("scale", "bias") and not name.startswith("_"):
            assert getattr(merged, name) == value
    chex.assert_trees_all_equal(merged.scale[...], SCALE)


# The call


def test_it_computes_what_the_function_computes():
    module = with_parameters(layer(activation=nnx.silu, dtype="bfloat16"))
    wanted = jgn.group_norm(X, GROUPS, SCALE, BIAS, activation=nnx.silu, dtype="bfloat16")
    chex.assert_trees_all_equal(module(X), wanted)


@pytest.mark.parametrize("group_size", [1, 2, 8])
def test_group_size_counts_the_channels_of_a_group(group_size):
    module = layer(num_groups=None, group_size=group_size)
    assert (module.num_groups, module.group_size) == (CHANNELS // group_size, group_size)
    assert_close(module(X), Oracle(X, CHANNELS // group_size).y)


@pytest.mark.parametrize("use_scale", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_scale_and_bias_switch_off_separately(use_scale, use_bias):
    module = layer(use_scale=use_scale, use_bias=use_bias)
    assert (module.use_scale, module.use_bias) == (use_scale, use_bias)
    learned = {"scale": use_scale, "bias": use_bias}
    assert set(nnx.state(module)) == {name for name in learned if learned[name]}
    for name, value in (("scale", SCALE), ("bias", BIAS)):
        if learned[name]:
            nnx.update(module, {name: jnp.asarray(value)})
    scale, bias = SCALE if use_scale else None, BIAS if use_bias else None
    assert_close(module(X), Oracle(X, GROUPS, scale, bias).y)


def test_scale_and_bias_of_each_sample_at_call_time():
    scale, bias = random((3, CHANNELS), 3), random((3, CHANNELS), 4)
    module = layer(use_scale=False, use_bias=False)
    assert_close(module(X, scale=scale, bias=bias), Oracle(X, GROUPS, scale, bias).y)


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_a_learned_parameter_and_one_at_call_time_exclude_each_other(name):
    message = rf"^{name} must come from the layer or from the call, .* use_{name}=False\)\.$"
    with pytest.raises(ValueError, match=message):
        layer()(X, **{name: SCALE})


def test_the_mask_goes_through():
    mask = np.arange(6).reshape(1, 6, 1, 1) < np.array([6, 2, 4]).reshape(3, 1, 1, 1)
    assert_close(layer()(X, mask=mask), Oracle(X, GROUPS, mask=mask).y)


def test_every_option_goes_through():
    x = random((2, 3, 8, 5))
    module = with_parameters(
        layer(
            epsilon=0.1,
            channel_axis=2,
            reduction_axes=(2, 3),
            activation=nnx.relu,
            dtype=jnp.float16,
        )
    )
    oracle = Oracle(x, GROUPS, SCALE, BIAS, epsilon=0.1, channel_axis=2, reduction_axes=(2, 3))
    y = module(x)
    assert y.dtype == jnp.float16
    np.testing.assert_allclose(y, np.maximum(oracle.y, 0), rtol=2e-3, atol=1e-5)


@pytest.mark.skipif(jax.device_count() < 4, reason="needs four devices; a CPU simulates them")
@pytest.mark.parametrize("index_groups", [None, [[0, 1], [2, 3]]])
def test_statistics_are_shared_over_a_named_axis(index_groups):
    x = random((4, 2, 3, 5, CHANNELS))
    module = layer(axis_name="shards", axis_index_groups=index_groups)
    mesh = jax.make_mesh((4,), ("shards",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4])
    shards = PartitionSpec("shards")
    y = jax.shard_map(
        lambda x: module(x[0])[None], mesh=mesh, in_specs=shards, out_specs=shards, check_vma=False
    )(x)
    for together in index_groups or [[0, 1, 2, 3]]:
        whole = np.concatenate(x[np.array(together)], axis=1)
        wanted = np.split(Oracle(whole, GROUPS).y, len(together), axis=1)
        assert_close(y[np.array(together)], np.stack(wanted))


# Transformations


class Residual(nnx.Module):
    def __init__(self, rngs):
        self.linear = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)
        self.norm = jgn.nnx.GroupNorm(CHANNELS, GROUPS, activation=nnx.silu, rngs=rngs)

    def __call__(self, x):
        return x + self.norm(self.linear(x))


def test_scan_over_layers_is_the_loop_over_them():
    depth = 3

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return Residual(rngs)

    layers = create(nnx.Rngs(0))
    assert layers.norm.scale.shape == (depth, CHANNELS)
    nnx.update(layers.norm, {"scale": jnp.asarray(random((depth, CHANNELS), 5))})

    def scanned(layers, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def forward(layer, x):
            return layer(x)

        return forward(layers, x)

    def unrolled(layers, x):
        graphdef, state = nnx.split(layers)
        for index in range(depth):
            x = nnx.merge(graphdef, jax.tree.map(lambda leaf, i=index: leaf[i], state))(x)
        return x

    chex.assert_trees_all_close(scanned(layers, X), unrolled(layers, X), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(
        nnx.to_pure_dict(gradient_of_squares(scanned, layers, X)),
        nnx.to_pure_dict(gradient_of_squares(unrolled, layers, X)),
        rtol=3e-5,
        atol=3e-5,
    )


@pytest.mark.parametrize("transform", [nnx.jit, nnx.remat])
def test_transformed_nothing_changes(transform):
    module = with_parameters(layer(activation=nnx.silu))
    transformed = transform(lambda module, x: module(x))
    chex.assert_trees_all_close(transformed(module, X), module(X), rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(
        nnx.to_pure_dict(gradient_of_squares(transformed, module, X)),
        nnx.to_pure_dict(gradient_of_squares(lambda module, x: module(x), module, X)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_an_epsilon_that_is_an_array_is_no_state():
    module = layer(epsilon=jnp.float32(1e-3))
    assert set(nnx.state(module)) == {"scale", "bias"}
    wanted = nnx.jit(lambda module, x: module(x))(module, X)
    chex.assert_trees_all_close(layer(epsilon=1e-3)(X), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("partial", [jax.tree_util.Partial, functools.partial])
def test_an_activation_may_be_a_partial_whose_arrays_are_state(partial):
    module = layer(activation=partial(jnp.multiply, jnp.float32(3)))
    chex.assert_trees_all_close(module(X), 3 * layer()(X), rtol=1e-5, atol=1e-5)
    assert 3 in [value.item() for value in jax.tree.leaves(nnx.state(module)) if value.ndim == 0]


def test_a_partial_of_a_method_of_no_pytree_is_one_of_a_function():
    class Factor:
        def times(self, factor, y):
            return factor * y

    module = layer(activation=functools.partial(Factor().times, jnp.float32(3)))
    chex.assert_trees_all_close(module(X), 3 * layer()(X), rtol=1e-5, atol=1e-5)


def test_a_network_trains():
    """It learns which of two waves each sequence holds, with every norm moving on the way."""
    labels = np.arange(64) % 2
    position = np.arange(16)
    waves = np.sin(position * np.where(labels, 0.5, 1.5)[:, None] + np.arange(64)[:, None])
    x = (waves[..., None] + random((64, 16, 1), deviation=0.3, mean=0)).astype(np.float32)

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.convolution = nnx.Conv(1, 16, (5,), rngs=rngs)
            self.norm = jgn.nnx.GroupNorm(16, 4, activation=nnx.silu, rngs=rngs)
            self.head = nnx.Linear(16, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.norm(self.convolution(x)).mean(1))

    network = Network(nnx.Rngs(0))
    before = nnx.to_pure_dict(nnx.state(network.norm))
    optimizer = nnx.Optimizer(network, optax.sgd(0.3, momentum=0.9), wrt=nnx.Param)

    @nnx.jit
    def step(network, optimizer):
        def loss(network):
            losses = optax.softmax_cross_entropy_with_integer_labels(network(x), labels)
            return losses.mean()

        value, gradients = nnx.value_and_grad(loss)(network)
        optimizer.update(network, gradients)
        return value

    losses = [step(network, optimizer) for _ in range(100)]
    assert losses[0] > 0.5
    assert losses[-1] < 0.05
    after = nnx.to_pure_dict(nnx.state(network.norm))
    for name in ("scale", "bias"):
        assert np.abs(after[name] - before[name]).max() > 0.01


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_groups": 3}, r"^num_groups must divide .* num_groups=3 for 8 channels; .* 2 and 4"),
        ({"num_groups": 32}, r"num_groups=32 for 8 channels; the nearest that do are 8 \("),
        ({"num_groups": 0}, r"^num_groups must be 1 or more: got 0\.$"),
        ({"group_size": 2}, r"^exactly one of num_groups and group_size must be given"),
        ({"num_groups": None}, r"^exactly one of num_groups and group_size must be given"),
        ({"num_groups": None, "group_size": 3}, r"^group_size must divide the channels"),
        ({"num_features": 0}, r"^num_features must be 1 or more: got 0\.$"),
    ],
)
def test_groups_that_do_not_fit_are_refused_by_the_constructor(options, message):
    options = {"num_features": CHANNELS, "num_groups": GROUPS, **options}
    with pytest.raises(ValueError, match=message):
        jgn.nnx.GroupNorm(**options, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["num_features", "num_groups"])
def test_a_count_that_is_no_integer_is_refused_by_the_constructor(name):
    options = {"num_features": CHANNELS, "num_groups": GROUPS, name: 8.0}
    with pytest.raises(TypeError, match=rf"^{name} must be an integer .*: got 8\.0\.$"):
        jgn.nnx.GroupNorm(**options, rngs=nnx.Rngs(0))


class Frozen(nnx.Module, pytree=False):
    """Its parameters are leaves of no tree."""

    def __init__(self):
        self.slope = nnx.Param(jnp.float32(0.5))

    def __call__(self, x):
        return jnp.where(x > 0, x, self.slope[...] * x)


@flax.struct.dataclass
class Scaled:
    """A pytree that is no module."""

    factor: jax.Array

    def times(self, x):
        return self.factor * x


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": "small"}, TypeError, r"^epsilon must be a number .*: got 'small'\.$"),
        ({"epsilon": -1.0}, ValueError, r"^epsilon must be .*: got -1\.0\.$"),
        ({"activation": 3}, TypeError, r"^activation must be callable: got 3\.$"),
        (
            {"activation": nnx.Sequential(nnx.relu, Frozen())},
            TypeError,
            r"^activation must be a pytree if it is a module: got Frozen, .* on the result instead",
        ),
        (
            {"activation": nnx.PReLU().__call__},
            TypeError,
            r"^activation must not be a method of a module or pytree: got PReLU\.__call__; give",
        ),
        (
            {"activation": functools.partial(nnx.PReLU().__call__)},
            TypeError,
            r"^activation must not be a method of a module or pytree: got PReLU\.__call__; give",
        ),
        (
            {"activation": Frozen().__call__},
            TypeError,
            r"^activation must not be a method of a module or pytree: got Frozen\.__call__; give",
        ),
        (
            {"activation": Scaled(jnp.float32(3)).times},
            TypeError,
            r"^activation must not be a method of a module or pytree: got Scaled\.times; give",
        ),
    ],
)
def test_an_epsilon_or_activation_of_no_use_is_refused_by_the_constructor(options, error, message):
    with pytest.raises(error, match=message):
        layer(**options)


@pytest.mark.parametrize("learned", [False, True])
def test_an_x_of_other_channels_is_refused(learned):
    module = layer(use_scale=learned, use_bias=learned)
    message = r"got 16 on axis -1 of shape \(2, 5, 16\) for num_features=8; see channel_axis\.$"
    with pytest.raises(ValueError, match=message):
        module(np.ones((2, 5, 16), np.float32))
