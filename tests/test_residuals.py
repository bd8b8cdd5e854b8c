"""For the backward pass autodiff keeps x, in its own dtype, and a few numbers a group."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jgn
from jgn.bench.contenders import bytes_kept

# Activations of a U-Net, a ResNet and two sequences, the second in groups of 512 elements.
SHAPES = [((2, 32, 32, 320), 32), ((4, 28, 28, 128), 32), ((8, 1024, 64), 8), ((256, 16, 256), 8)]
# Two sums for every 16 positions, and for every 256, are there for a moment, beside x's size.
SUMS_OF_BLOCKS = 2 / 16 + 2 / 256 + 0.02
DTYPES = ("float32", "bfloat16", "float16")


def abstract(shape, dtype):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("activation", [None, jax.nn.silu])
@pytest.mark.parametrize(
    ("dtype", "shape", "num_groups"),
    [
        *((dtype, *case) for dtype in DTYPES for case in SHAPES),
        *((dtype, *SHAPES[1]) for dtype in ("float64", "complex64", "complex128")),
    ],
)
def test_the_function_keeps_x_and_little_more(shape, num_groups, dtype, activation):
    x, channels = abstract(shape, dtype), abstract(shape[-1:], "float32")

    def normalized(x, scale, bias):
        return jgn.group_norm(x, num_groups, scale, bias, activation=activation)

    x_bytes = x.size * x.dtype.itemsize
    with jax.enable_x64(dtype in ("float64", "complex128")):
        kept = bytes_kept(normalized, x, channels, channels)
    # Fewer bytes than x's own would mean that this counts wrongly.
    assert x_bytes <= kept <= 1.02 * x_bytes


@pytest.mark.skipif(jax.device_count() < 2, reason="needs two devices; a CPU simulates them")
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_mesh_it_keeps_no_more(dtype, axis_type):
    mesh = jax.make_mesh((2,), ("a",), (axis_type,), devices=jax.devices()[:2])
    shape, spec = (4, 28, 28, 128), PartitionSpec(None, "a")
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        kept = bytes_kept(lambda x: jgn.group_norm(x, 32, activation=jax.nn.silu), x)
    x_bytes = x.size * x.dtype.itemsize
    assert x_bytes <= kept <= 1.02 * x_bytes


def test_a_mask_of_a_number_a_position_costs_its_own_size():
    x, mask = abstract((8, 1024, 64), "bfloat16"), abstract((8, 1024, 1), "bool")

    def kept(x, mask):
        return jax.vjp(lambda x: jgn.group_norm(x, 8, mask=mask, activation=jax.nn.silu), x)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, x, mask))
    sizes = sorted(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert sum(sizes) <= 1.02 * (x.size * 2 + mask.size)


def test_the_same_count_finds_what_a_plain_composition_keeps():
    """flax keeps x, and what its activation needs beside it."""
    x = abstract((4, 28, 28, 128), "float32")
    layer = nn.GroupNorm(32, use_scale=False, use_bias=False)
    kept = bytes_kept(lambda x: jax.nn.silu(layer.apply({}, x)), x)
    assert kept > 3 * x.size * x.dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_scan_over_layers_keeps_each_layers_x(dtype):
    x, layers = abstract((4, 28, 28, 128), dtype), 3
    parameters = abstract((layers, 128), "float32")

    def scanned(x, scales, biases):
        def layer(x, scale_and_bias):
            return jgn.group_norm(x, 32, *scale_and_bias, activation=jax.nn.silu), None

        return lax.scan(layer, x, (scales, biases))[0]

    kept = bytes_kept(scanned, x, parameters, parameters)
    x_bytes = layers * x.size * x.dtype.itemsize
    assert x_bytes <= kept <= 1.02 * x_bytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_nn_scan_over_layers_keeps_each_layers_x(dtype):
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jgn.GroupNorm(32, activation=nn.silu)(x), None

    x, layers = abstract((4, 28, 28, 128), dtype), 3
    scan = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=layers)
    variables = jax.eval_shape(scan().init, jax.random.key(0), x, None)
    kept = bytes_kept(lambda variables, x: scan().apply(variables, x, None)[0], variables, x)
    x_bytes = layers * x.size * x.dtype.itemsize
    assert x_bytes <= kept <= 1.02 * x_bytes


def test_the_layer_keeps_what_the_function_keeps():
    x = abstract((4, 28, 28, 128), "bfloat16")
    layer = jgn.GroupNorm(32, activation=nn.silu)
    variables = jax.eval_shape(layer.init, jax.random.key(0), x)
    kept = bytes_kept(layer.apply, variables, x)
    assert kept <= 1.02 * x.size * x.dtype.itemsize


def test_the_compiled_training_step_holds_no_further_copy_of_x():
    """Only x, the cotangent and the gradient are of x's size while it runs."""
    x = abstract((8, 32, 32, 128), "float32")

    @functools.partial(jax.jit, donate_argnums=1)
    def step(x, cotangent):
        return jax.vjp(lambda x: jgn.group_norm(x, 32), x)[1](cotangent)[0]

    memory = step.lower(x, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= SUMS_OF_BLOCKS * x.size * np.dtype(jnp.float32).itemsize


# Blocks of 16 of 32; of 53, which is a prime number, 6 blocks of 9, the last of which lacks 1.
# Of a bfloat16 XLA:CPU computes tanh in float32, and keeps that as well, when it has no sums yet.
@pytest.mark.parametrize(
    ("shape", "dtype", "at_most"),
    [
        ((8, 32, 32, 128), "float32", 1 + SUMS_OF_BLOCKS),
        ((4, 53, 53, 64), "float32", 1.3),
        ((8, 32, 32, 128), "bfloat16", 3.1),
        ((4, 53, 53, 64), "bfloat16", 3.1),
    ],
)
def test_a_compiled_network_holds_one_array_a_layer(shape, dtype, at_most):
    """Between the passes it keeps the second layer's x, not also what either makes of its own."""
    x = abstract(shape, dtype)

    @jax.jit
    def gradient(x):
        def loss(x):
            y = jnp.tanh(jgn.group_norm(jnp.tanh(jgn.group_norm(x, 32)), 32))
            return y.astype(jnp.float32).sum()

        return jax.grad(loss)(x)

    memory = gradient.lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= at_most * x.size * x.dtype.itemsize
