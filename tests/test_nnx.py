"""The flax.nnx layer: flax.nnx.GroupNorm's state, under nnx's transformations and optimizer."""

import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import random
from flax import nnx
from oracle import Oracle, tolerance

import jgn
import jgn.nnx

SHAPE, GROUPS = (3, 6, 5, 8), 4
X, SCALE, BIAS = random(SHAPE), random((8,), 1), random((8,), 2)


def assert_close(actual, wanted):
    atol = tolerance("float32", 120) * np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


def with_parameters(layer):
    layer.scale[...], layer.bias[...] = SCALE, BIAS
    return layer


def test_importing_jgn_does_not_import_it():
    program = "import sys, jgn; assert 'jgn.nnx' not in sys.modules; assert not hasattr(jgn, 'nnx')"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_it_computes_what_the_function_computes():
    layer = with_parameters(
        jgn.nnx.GroupNorm(8, GROUPS, activation=nnx.silu, dtype="bfloat16", rngs=nnx.Rngs(0))
    )
    wanted = jgn.group_norm(X, GROUPS, SCALE, BIAS, activation=nnx.silu, dtype="bfloat16")
    chex.assert_trees_all_equal(layer(X), wanted)


@pytest.mark.parametrize(
    "configuration",
    [
        {"num_groups": 4},
        {"num_groups": None, "group_size": 2},
        {"num_groups": 4, "use_bias": False},
        {"num_groups": 4, "use_scale": False},
        {"num_groups": 4, "scale_init": nnx.initializers.normal(), "param_dtype": jnp.bfloat16},
    ],
    ids=lambda configuration: "-".join(configuration),
)
def test_its_state_is_that_of_flax(configuration):
    ours = nnx.state(jgn.nnx.GroupNorm(8, rngs=nnx.Rngs(0), **configuration), nnx.Param)
    theirs = nnx.state(nnx.GroupNorm(8, rngs=nnx.Rngs(0), **configuration), nnx.Param)
    chex.assert_trees_all_equal(nnx.to_pure_dict(ours), nnx.to_pure_dict(theirs))
    chex.assert_trees_all_equal_dtypes(nnx.to_pure_dict(ours), nnx.to_pure_dict(theirs))


def test_metadata_reaches_the_parameters():
    layer = jgn.nnx.GroupNorm(
        8, GROUPS, scale_metadata={"decayed": False}, bias_metadata={"frozen": 1}, rngs=nnx.Rngs(0)
    )
    assert layer.scale.get_metadata("decayed") is False
    assert layer.bias.get_metadata("frozen") == 1


def test_a_state_of_flax_loads():
    theirs = with_parameters(nnx.GroupNorm(8, GROUPS, epsilon=1e-5, rngs=nnx.Rngs(0)))
    ours = jgn.nnx.GroupNorm(8, GROUPS, rngs=nnx.Rngs(1))
    nnx.update(ours, nnx.state(theirs, nnx.Param))
    assert_close(ours(X), theirs(X))
    assert_close(ours(X), Oracle(X, GROUPS, SCALE, BIAS).y)


def test_mask_scale_and_bias_at_call_time():
    layer = jgn.nnx.GroupNorm(8, GROUPS, use_scale=False, use_bias=False, rngs=nnx.Rngs(0))
    mask = np.arange(6).reshape(1, 6, 1, 1) < 4
    scale, bias = random((3, 8), 3), random((3, 8), 4)
    y = layer(X, mask=mask, scale=scale, bias=bias)
    assert_close(y, Oracle(X, GROUPS, scale, bias, mask=mask).y)


def test_split_and_merge_and_channels_first():
    layer = with_parameters(jgn.nnx.GroupNorm(8, GROUPS, channel_axis=1, rngs=nnx.Rngs(0)))
    first = np.moveaxis(X, -1, 1)
    again = nnx.merge(*nnx.split(layer))
    chex.assert_trees_all_equal(again(first), layer(first))
    assert_close(np.moveaxis(again(first), 1, -1), Oracle(X, GROUPS, SCALE, BIAS).y)


class Regression(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 8, rngs=rngs)
        self.norm = jgn.nnx.GroupNorm(8, GROUPS, activation=nnx.silu, rngs=rngs)
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.out(self.norm(self.dense(x)))


def test_it_trains_under_nnx_jit():
    model = Regression(nnx.Rngs(0))
    # A schedule-free optimizer: optax's schedules promote implicitly.
    optimizer = nnx.Optimizer(model, optax.sgd(0.05), wrt=nnx.Param)
    x = random((64, 4), deviation=1.0)
    wanted = np.sin(x).sum(-1, keepdims=True).astype(np.float32)

    @nnx.jit
    def step(model, optimizer):
        def loss_of(model):
            return jnp.mean((model(x) - wanted) ** 2)

        loss, gradients = nnx.value_and_grad(loss_of)(model)
        optimizer.update(model, gradients)
        return loss

    first = step(model, optimizer)
    for _ in range(100):
        last = step(model, optimizer)
    assert last < first / 4
    assert np.abs(model.norm.scale[...] - 1).max() > 1e-3
    assert np.abs(model.norm.bias[...]).max() > 1e-3


def test_scan_over_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def create(rngs):
        initializer = nnx.initializers.normal()
        return jgn.nnx.GroupNorm(8, GROUPS, scale_init=initializer, rngs=rngs)

    layers = create(nnx.Rngs(0))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return layer(x)

    wanted = X
    for scale in layers.scale[...]:
        wanted = jgn.group_norm(wanted, GROUPS, scale)
    assert_close(forward(jnp.asarray(X), layers), wanted)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"num_groups": 3}, ValueError, "num_groups=3 for 8 channels; the nearest that do are 2 "),
        ({"group_size": 2}, ValueError, "exactly one of num_groups and group_size must be given"),
        ({"num_groups": 2.0}, TypeError, "num_groups must be an integer"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_groups_are_told_at_construction(arguments, error, text):
    with pytest.raises(error, match=text):
        jgn.nnx.GroupNorm(8, rngs=nnx.Rngs(0), **arguments)


def test_bad_calls_are_told():
    layer = jgn.nnx.GroupNorm(8, GROUPS, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"^x must have 8 channels along axis -1: got shape \(3, 4"
    ):
        layer(np.ones((3, 4), np.float32))
    with pytest.raises(ValueError, match=r"^bias must come from the layer or from the call, not"):
        layer(X, bias=BIAS)
    with pytest.raises(TypeError, match=r"^x must be an array of numbers: got None"):
        layer(None)


def test_jax_transformations_see_through_it():
    layer = with_parameters(jgn.nnx.GroupNorm(8, GROUPS, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(layer)
    y = jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, X)
    assert_close(y, Oracle(X, GROUPS, SCALE, BIAS).y)
