"""Activations that have arrays: their values, gradients and memory, of any framework's kind."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from flax import nnx
from flax.errors import TraceContextError
from jax.tree_util import Partial

import jgn
import jgn.nnx
from jgn._group_norm import _group_norm

X, GROUPS = random((3, 6, 5, 8)), 4


def prelu(slope):
    module = nnx.PReLU()
    module.negative_slope[...] = jnp.asarray(slope, jnp.float32)
    return module


def equinox_prelu(slope):
    return pytest.importorskip("equinox").nn.PReLU(slope)


def partial(slope):
    return Partial(jax.nn.leaky_relu, negative_slope=jnp.asarray(slope, jnp.float32))


EVERY_KIND = pytest.mark.parametrize("activation", [prelu, equinox_prelu, partial])


def fused(activation, x=X):
    return jgn.group_norm(x, GROUPS, activation=activation)


def apart(activation, x=X):
    return activation(jgn.group_norm(x, GROUPS))


@EVERY_KIND
def test_the_value_of_an_array_is_that_of_the_call(activation):
    before = fused(activation(0.1))
    np.testing.assert_allclose(before, apart(activation(0.1)), rtol=1e-6)
    compiled = _group_norm._cache_size()
    for slope in (0.1, 0.5, 3.0):
        np.testing.assert_allclose(fused(activation(slope)), apart(activation(slope)), rtol=1e-6)
    assert _group_norm._cache_size() == compiled
    np.testing.assert_array_equal(fused(activation(0.1)), before)


def test_a_layer_sees_what_became_of_its_activation():
    layer = jgn.nnx.GroupNorm(8, GROUPS, activation=nnx.PReLU(), rngs=nnx.Rngs(0))
    layer(X)
    layer.activation.negative_slope[...] = jnp.float32(5)
    np.testing.assert_allclose(layer(X), apart(prelu(5)), rtol=1e-6)


def test_a_method_sees_what_became_of_its_pytree():
    module = prelu(0.1)
    fused(module.__call__)
    module.negative_slope[...] = jnp.float32(5)
    np.testing.assert_allclose(fused(module.__call__), apart(module), rtol=1e-6)


def python_partial(slope):
    """Made anew in each call, as in the method of a layer; JAX takes it for one leaf."""
    return functools.partial(jax.nn.leaky_relu, negative_slope=slope)


@pytest.mark.parametrize("slope", [0.2, jnp.float32(0.2), np.full((), 0.2, np.float32)], ids=type)
def test_a_partial_of_python_is_no_function_made_anew(slope):
    np.testing.assert_allclose(fused(python_partial(slope)), apart(partial(0.2)), rtol=1e-6)
    compiled = _group_norm._cache_size()
    fused(python_partial(slope))
    assert _group_norm._cache_size() == compiled


def test_a_partial_of_python_sees_what_became_of_its_arrays():
    module, slope = prelu(0.1), np.full((), 0.1, np.float32)
    activations = functools.partial(module.__call__), python_partial(slope)
    for activation in activations:
        np.testing.assert_allclose(fused(activation), apart(prelu(0.1)), rtol=1e-6)
    module.negative_slope[...] = jnp.float32(5)
    slope[...] = 5
    for activation in activations:
        np.testing.assert_allclose(fused(activation), apart(prelu(5)), rtol=1e-6)


def test_a_method_of_an_object_without_a_hash_is_a_function():
    @dataclasses.dataclass
    class Factor:
        factor: float

        def times(self, y):
            return self.factor * y

    for activation in (Factor(3.0).times, functools.partial(Factor(3.0).times)):
        np.testing.assert_allclose(fused(activation), apart(activation), rtol=1e-6)


def test_arrays_of_a_partial_of_python_have_gradients():
    def gradient(function):
        return jax.grad(lambda slope: function(python_partial(slope)).sum())(jnp.float32(0.3))

    np.testing.assert_allclose(gradient(fused), gradient(apart), rtol=1e-5)


@EVERY_KIND
def test_arrays_have_gradients(activation):
    def gradients(function):
        def loss(activation, x):
            return jnp.square(function(activation, x)).sum()

        return jax.tree.leaves(jax.jit(jax.grad(loss, (0, 1)))(activation(0.3), X))

    for actual, wanted in zip(gradients(fused), gradients(apart), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-4 * np.abs(wanted).max())


def test_arrays_may_be_mapped():
    slopes = jnp.array([0.1, 2])
    y = jax.vmap(lambda slope: fused(partial(slope)))(slopes)
    np.testing.assert_allclose(y, [apart(partial(slope)) for slope in slopes], rtol=1e-6)


@pytest.mark.parametrize("equal", [(True, 1), (2, 2.0), (0.0, -0.0), (np.float32(2), 2.0)], ids=str)
def test_numbers_that_are_equal_but_not_the_same_are_told_apart(equal):
    def spelled(number, y):
        return y * len(repr(number))

    for number in (*equal, *reversed(equal)):
        activation = Partial(spelled, number)
        np.testing.assert_allclose(fused(activation), apart(activation), rtol=1e-6)


@EVERY_KIND
def test_x_alone_is_kept(activation):
    kept = jax.eval_shape(lambda a, x: jax.vjp(fused, a, x)[1], activation(0.3), X)
    of_its_size = [leaf for leaf in jax.tree.leaves(kept) if leaf.size >= X.size]
    assert len(of_its_size) == 1


def test_a_module_that_counts_its_calls_is_refused():
    """Else each call would drop the same elements."""
    with pytest.raises(TraceContextError):
        fused(nnx.Dropout(0.5, rngs=nnx.Rngs(0)))


def test_a_module_of_linen_is_called_on_the_result():
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jgn.GroupNorm(GROUPS, activation=nn.PReLU())(x)

    with pytest.raises(TypeError, match="got PReLU; call it on the result instead"):
        Network().init(jax.random.key(0), X)
