"""The layer: flax.linen.GroupNorm's parameters and checkpoints, under flax's transformations."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from flax.traverse_util import flatten_dict
from jax.sharding import PartitionSpec
from oracle import Oracle, tolerance

import jgn

SHAPE, GROUPS, KEY = (3, 6, 5, 8), 4, jax.random.key(0)
X, SCALE, BIAS = random(SHAPE), random((8,), 1), random((8,), 2)
VARIABLES = {"params": {"scale": SCALE, "bias": BIAS}}


def assert_close(actual, wanted, elements=60):
    atol = tolerance("float32", elements) * np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize(
    "configuration",
    [
        {"num_groups": 4},
        {"num_groups": None, "group_size": 2},
        {"num_groups": 4, "use_bias": False},
        {"num_groups": 4, "use_scale": False},
        {"num_groups": 4, "use_scale": False, "use_bias": False},
        {"num_groups": 4, "param_dtype": jnp.bfloat16},
        {
            "num_groups": 4,
            "scale_init": nn.initializers.normal(),
            "bias_init": nn.initializers.ones,
        },
        {"num_groups": 4, "reduction_axes": (-3, -2, -1)},
    ],
    ids=lambda configuration: "-".join(configuration),
)
def test_the_parameters_are_those_of_flax(configuration):
    ours = jgn.GroupNorm(**configuration).init(KEY, X)
    with jax.numpy_dtype_promotion("standard"):  # flax multiplies float32 by bfloat16
        theirs = nn.GroupNorm(**configuration).init(KEY, X)
    chex.assert_trees_all_equal_dtypes(ours, theirs)
    chex.assert_trees_all_equal(ours, theirs)


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
@pytest.mark.parametrize("groups", [{"num_groups": 4}, {"num_groups": None, "group_size": 4}])
def test_a_checkpoint_of_flax_gives_the_same_output_for_the_same_epsilon(epsilon, groups):
    ours = jgn.GroupNorm(epsilon=epsilon, **groups).apply(VARIABLES, X)
    theirs = nn.GroupNorm(epsilon=epsilon, **groups).apply(VARIABLES, X)
    # flax's own rounding: E[x²] − E[x]² loses (μ/σ)² more.
    assert_close(ours, theirs, elements=120)


def test_the_default_epsilon_is_that_of_the_equation():
    x = 1e-3 * X
    y = jgn.GroupNorm(GROUPS).apply(VARIABLES, x)
    assert_close(y, Oracle(x, GROUPS, SCALE, BIAS, epsilon=1e-5).y)
    assert np.abs(y - Oracle(x, GROUPS, SCALE, BIAS, epsilon=1e-6).y).max() > 0.1


@pytest.mark.parametrize("group_size", [1, 2, 8])
def test_group_size_counts_the_channels_of_a_group(group_size):
    y = jgn.GroupNorm(num_groups=None, group_size=group_size).apply(VARIABLES, X)
    assert_close(y, Oracle(X, 8 // group_size, SCALE, BIAS).y, elements=30 * group_size)


@pytest.mark.parametrize("use_scale", [False, True])
@pytest.mark.parametrize("use_bias", [False, True])
def test_scale_and_bias_switch_off_separately(use_scale, use_bias):
    layer = jgn.GroupNorm(GROUPS, use_scale=use_scale, use_bias=use_bias)
    names = {name for name, used in (("scale", use_scale), ("bias", use_bias)) if used}
    assert layer.init(KEY, X).get("params", {}).keys() == names
    parameters = {name: value for name, value in VARIABLES["params"].items() if name in names}
    y = layer.apply({"params": parameters}, X)
    assert_close(y, Oracle(X, GROUPS, **parameters).y)


def test_scale_and_bias_of_each_sample_at_call_time():
    scale, bias = random((3, 8), 3), random((3, 8), 4)
    layer = jgn.GroupNorm(GROUPS, use_scale=False, use_bias=False)
    assert layer.init(KEY, X, scale=scale, bias=bias) == {}
    assert_close(layer.apply({}, X, scale=scale, bias=bias), Oracle(X, GROUPS, scale, bias).y)


def test_a_learned_bias_with_a_scale_at_call_time():
    scale = random((3, 8), 3)
    layer = jgn.GroupNorm(GROUPS, use_scale=False)
    y = layer.apply({"params": {"bias": BIAS}}, X, scale=scale)
    assert_close(y, Oracle(X, GROUPS, scale, BIAS).y)


@pytest.mark.parametrize(
    ("x_dtype", "dtype", "param_dtype", "expected"),
    [
        ("bfloat16", None, "float32", "bfloat16"),
        ("float32", None, "bfloat16", "float32"),
        ("float32", "bfloat16", "float32", "bfloat16"),
        ("float16", "float32", "float16", "float32"),
    ],
)
def test_dtypes_of_output_and_parameters(x_dtype, dtype, param_dtype, expected):
    layer = jgn.GroupNorm(GROUPS, dtype=dtype, param_dtype=param_dtype)
    y, variables = layer.init_with_output(KEY, random(SHAPE, dtype=x_dtype))
    assert y.dtype == expected
    chex.assert_type(jax.tree.leaves(variables), jnp.dtype(param_dtype))


def test_the_mask_goes_through():
    mask = np.arange(6).reshape(1, 6, 1, 1) < 4
    y = jgn.GroupNorm(GROUPS).apply(VARIABLES, X, mask=mask)
    assert_close(y, Oracle(X, GROUPS, SCALE, BIAS, mask=mask).y)


def test_every_option_goes_through():
    x = np.moveaxis(X, -1, 1)
    layer = jgn.GroupNorm(
        2, epsilon=0.1, channel_axis=1, reduction_axes=(1, 2), activation=nn.relu, dtype="bfloat16"
    )
    y = layer.apply(VARIABLES, x)
    options = {"epsilon": 0.1, "channel_axis": 1, "reduction_axes": (1, 2), "dtype": "bfloat16"}
    wanted = jgn.group_norm(x, 2, SCALE, BIAS, activation=nn.relu, **options)
    chex.assert_trees_all_equal(y, wanted)
    assert not np.array_equal(wanted, jgn.group_norm(x, 2, SCALE, BIAS, channel_axis=1))


def test_statistics_are_shared_over_a_named_axis():
    layer = jgn.GroupNorm(GROUPS, axis_name="parts")
    parts = jnp.asarray(X).reshape(3, 2, 3, 5, 8)
    y = jax.vmap(lambda x: layer.apply(VARIABLES, x), 1, 1, axis_name="parts")(parts)
    assert_close(y.reshape(SHAPE), Oracle(X, GROUPS, SCALE, BIAS).y)


class Compact(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jgn.GroupNorm(GROUPS, name="norm")(nn.Dense(8, name="dense")(x))


class Setup(nn.Module):
    def setup(self):
        self.dense = nn.Dense(8)
        self.norm = jgn.GroupNorm(GROUPS)

    def __call__(self, x):
        return self.norm(self.dense(x))


def test_inside_compact_and_setup_it_is_the_same_layer():
    compact, setup = Compact().init(KEY, X), Setup().init(KEY, X)
    chex.assert_trees_all_equal_shapes_and_dtypes(compact, setup)
    assert compact["params"]["norm"].keys() == {"scale", "bias"}
    chex.assert_trees_all_equal(Compact().apply(compact, X), Setup().apply(compact, X))


@pytest.mark.parametrize(
    "reduction_axes", [(0, 1, 2), [0, 1, 2], {-1, 0, 1}, np.arange(3)], ids=type
)
def test_unbatched_under_vmap_with_reduction_axes(reduction_axes):
    layer = jgn.GroupNorm(GROUPS, reduction_axes=reduction_axes)
    y = jax.vmap(lambda x: layer.apply(VARIABLES, x))(X)
    assert_close(y, Oracle(X, GROUPS, SCALE, BIAS).y)


def test_under_nn_vmap_each_copy_has_its_parameters():
    copies = nn.vmap(
        jgn.GroupNorm, in_axes=0, variable_axes={"params": 0}, split_rngs={"params": True}
    )(GROUPS, scale_init=nn.initializers.normal(1.0))
    x = np.stack([X, 2 * X])
    y, variables = copies.init_with_output(KEY, x)
    scale = variables["params"]["scale"]
    chex.assert_shape(scale, (2, 8))
    assert (scale[0] != scale[1]).all()
    for i in range(2):
        assert_close(y[i], Oracle(x[i], GROUPS, scale[i]).y)


def test_under_nn_remat_nothing_changes():
    plain, rematerialized = jgn.GroupNorm(GROUPS), nn.remat(jgn.GroupNorm)(GROUPS)

    def gradients(layer):
        return jax.grad(lambda v, x: (layer.apply(v, x) ** 3).sum(), (0, 1))(VARIABLES, X)

    chex.assert_trees_all_equal(plain.init(KEY, X), rematerialized.init(KEY, X))
    jax.tree.map(assert_close, gradients(rematerialized), gradients(plain))


def test_partitioned_initializers_keep_their_axis_names():
    layer = jgn.GroupNorm(
        GROUPS,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed",)),
        bias_init=nn.with_partitioning(nn.initializers.zeros, ("model",)),
    )
    y, variables = layer.init_with_output(KEY, X)
    assert nn.get_partition_spec(variables) == {
        "params": {"scale": PartitionSpec("embed"), "bias": PartitionSpec("model")}
    }
    assert_close(y, Oracle(X, GROUPS).y)
    assert_close(layer.apply(nn.unbox(variables), X), Oracle(X, GROUPS).y)


def test_tabulate_shows_the_layer_and_its_parameters():
    table = Compact().tabulate(KEY, X, console_kwargs={"width": 160, "force_terminal": False})
    row = next(line for line in table.splitlines() if "norm" in line)
    assert "GroupNorm" in row
    assert "bias: float32[8]" in row
    assert "float32[3,6,5,8]" in row


def test_its_one_call_is_the_only_one_that_flax_lists():
    _, state = Compact().init_with_output(
        KEY, X, capture_intermediates=lambda module, _: isinstance(module, jgn.GroupNorm)
    )
    assert list(flatten_dict(state["intermediates"])) == [("norm", "__call__")]


def test_its_repr_shows_the_configuration():
    text = repr(jgn.GroupNorm(num_groups=None, group_size=16, epsilon=1e-3, channel_axis=1))
    for setting in ("group_size = 16", "epsilon = 0.001", "channel_axis = 1", "num_groups = None"):
        assert setting in text


def test_equal_configurations_are_equal_layers():
    assert jgn.GroupNorm(4, epsilon=1e-3) == jgn.GroupNorm(4, epsilon=1e-3)
    assert jgn.GroupNorm(4) != jgn.GroupNorm(8)
    assert jgn.GroupNorm(4).clone(num_groups=2).num_groups == 2
