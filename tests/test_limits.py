"""Limits in the README that JAX decides: where one goes, a test fails, and its words go, too."""

import copy
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from jax.experimental import jet

import jgn
from jgn._group_norm import _group_norm

X, SCALE = random((2, 6, 8)), random((8,), 1)


def test_an_activation_made_anew_is_compiled_anew():
    def compiled_for(activations):
        before = _group_norm._cache_size()
        for activation in activations:
            jgn.group_norm(X, 4, activation=activation)
        return _group_norm._cache_size() - before

    def made_once(y):
        return y + 1

    assert compiled_for([made_once, made_once, made_once]) == 1
    assert compiled_for([lambda y: y + 1, lambda y: y + 1, lambda y: y + 1]) == 3


def test_a_layer_with_a_compiled_activation_is_copied_but_not_pickled():
    layer = jgn.GroupNorm(4, activation=nn.silu)
    y, variables = layer.init_with_output(jax.random.key(0), X)
    np.testing.assert_array_equal(copy.deepcopy(layer).apply(variables, X), y)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        pickle.dumps(layer)
    plain = jgn.GroupNorm(4)
    unpickled = pickle.loads(pickle.dumps(plain))
    np.testing.assert_array_equal(unpickled.apply(variables, X), plain.apply(variables, X))


def test_cloudpickle_copies_a_layer_with_a_compiled_activation():
    cloudpickle = pytest.importorskip("cloudpickle")
    layer = jgn.GroupNorm(4, activation=nn.silu)
    y, variables = layer.init_with_output(jax.random.key(0), X)
    unpickled = pickle.loads(cloudpickle.dumps(layer))
    np.testing.assert_array_equal(unpickled.apply(variables, X), y)


def test_jet_has_no_rule_for_checkpoints():
    with pytest.raises((KeyError, NotImplementedError), match=r"remat|checkpoint"):
        jet.jet(lambda x: jgn.group_norm(x, 4), (X,), ((jnp.ones_like(X),),))


def test_linear_transposes_by_scale_are_gradients_on_one_cpu(traced_for):
    traced_for("cpu")
    cotangent = random(X.shape, 2)
    gradient = jax.grad(lambda s: jnp.vdot(cotangent, jgn.group_norm(X, 4, s)))(SCALE)
    transpose = jax.linear_transpose(lambda scale: jgn.group_norm(X, 4, scale), SCALE)
    np.testing.assert_allclose(transpose(cotangent)[0], gradient, rtol=1e-5, atol=1e-5)
