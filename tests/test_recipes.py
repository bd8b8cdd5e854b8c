"""What the README's recipes claim: one residual, padding without effect, serving without jgn."""

import os
import pathlib
import re
import subprocess
import sys
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from flax import nnx
from oracle import Oracle, tolerance

import jgn
import jgn.nnx

# Adaptive group normalization


class AdaptiveNorm(nn.Module):
    num_groups: int = 32

    @nn.compact
    def __call__(self, x, condition):
        to_both = nn.Dense(2 * x.shape[-1], kernel_init=nn.initializers.zeros)
        scale, bias = jnp.split(to_both(nn.silu(condition)), 2, axis=-1)
        norm = jgn.GroupNorm(self.num_groups, use_scale=False, use_bias=False, activation=nn.silu)
        return norm(x, scale=1 + scale, bias=bias)


class AdaptiveNormOfNnx(nnx.Module):
    def __init__(self, features, condition_features, num_groups=32, *, rngs):
        zeros = nnx.initializers.zeros
        self.to_both = nnx.Linear(condition_features, 2 * features, kernel_init=zeros, rngs=rngs)
        self.norm = jgn.nnx.GroupNorm(
            features, num_groups, use_scale=False, use_bias=False, activation=nnx.silu, rngs=rngs
        )

    def __call__(self, x, condition):
        scale, bias = jnp.split(self.to_both(nnx.silu(condition)), 2, axis=-1)
        return self.norm(x, scale=1 + scale, bias=bias)


X, CONDITION = random((3, 6, 5, 16)), random((3, 7), 1)
KERNEL, OFFSETS = random((7, 32), 2, deviation=0.3), random((32,), 3, deviation=0.3)


def wanted_of_adaptive_norm(x):
    condition = CONDITION / (1 + np.exp(-CONDITION))
    scale, bias = np.split(condition @ KERNEL + OFFSETS, 2, axis=-1)
    y = Oracle(x, 4, 1 + scale, bias).y
    return y / (1 + np.exp(-y))


def test_each_sample_is_scaled_by_its_condition():
    variables = {"params": {"Dense_0": {"kernel": KERNEL, "bias": OFFSETS}}}
    module = AdaptiveNormOfNnx(16, 7, 4, rngs=nnx.Rngs(0))
    nnx.update(module.to_both, {"kernel": jnp.asarray(KERNEL), "bias": jnp.asarray(OFFSETS)})
    wanted = wanted_of_adaptive_norm(X)
    atol = tolerance("float32", 120) * np.abs(wanted).max()
    for y in (AdaptiveNorm(4).apply(variables, X, CONDITION), module(X, CONDITION)):
        np.testing.assert_allclose(y, wanted, rtol=0, atol=atol)


def test_it_starts_as_if_there_were_no_condition():
    y, _ = AdaptiveNorm(4).init_with_output(jax.random.key(0), X, CONDITION)
    unconditioned = jgn.group_norm(X, 4, activation=nn.silu)
    np.testing.assert_array_equal(y, unconditioned)
    module = AdaptiveNormOfNnx(16, 7, 4, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(module(X, CONDITION), unconditioned)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_for_the_backward_pass_it_keeps_x_and_little_more(dtype):
    x = jax.ShapeDtypeStruct((4, 32, 32, 320), dtype)
    condition = jax.ShapeDtypeStruct((4, 64), "float32")
    layer = AdaptiveNorm()
    variables = jax.eval_shape(layer.init, jax.random.key(0), x, condition)

    def kept_for_backward(variables, x):
        return jax.vjp(lambda v, x: layer.apply(v, x, jnp.ones((4, 64))), variables, x)[1]

    kept = jax.tree.leaves(jax.eval_shape(kept_for_backward, variables, x))
    of_size_of_x = [leaf for leaf in kept if leaf.size >= x.size / 4]
    assert [(leaf.shape, leaf.dtype) for leaf in of_size_of_x] == [(x.shape, x.dtype)]
    kept_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in kept)
    assert kept_bytes <= 1.02 * x.size * x.dtype.itemsize


# Masks for variable-length batches

LENGTHS = np.array([10, 7, 3, 1, 0])
MASK = (np.arange(10) < LENGTHS[:, None])[:, :, None]
TOKENS = random((5, 10, 16))


@pytest.mark.parametrize("padding", [0.0, 1e30, np.inf, -np.inf, np.nan])
def test_what_lies_in_the_padding_changes_no_bit(padding):
    def pooled(tokens):
        y = jgn.group_norm(tokens, 4, mask=MASK, activation=nn.silu)
        return jnp.where(MASK, y, 0)

    def gradient(tokens):
        return jax.grad(lambda tokens: (pooled(tokens) ** 2).sum())(tokens)

    padded = np.where(MASK, TOKENS, np.float32(padding))
    for function in (pooled, gradient):
        np.testing.assert_array_equal(function(padded), function(np.where(MASK, TOKENS, 7.0)))
    assert not gradient(padded)[~MASK[..., 0]].any()


@pytest.mark.parametrize("amount", [0, 1, 90])
def test_the_amount_of_padding_changes_no_more_than_rounding(amount):
    sequence = TOKENS[:1, :7]
    padded = np.concatenate([sequence, np.full((1, amount, 16), np.nan, np.float32)], axis=1)
    y = jgn.group_norm(padded, 4, mask=np.arange(7 + amount)[:, None] < 7)[:, :7]
    wanted = Oracle(sequence, 4).y
    np.testing.assert_allclose(y, wanted, rtol=0, atol=5 * tolerance("float32", 28))


# Serving

SERVE = """
    import pathlib, sys
    import jax, numpy as np

    file, images, logits = sys.argv[1:]
    predict = jax.export.deserialize(bytearray(pathlib.Path(file).read_bytes())).call
    images = np.load(images)
    np.save(logits, np.concatenate([predict(images[:300]), predict(images[300:])]))
    assert not {"jgn", "flax"} & set(sys.modules), "the file needs neither"
"""
FILES = ("digits.stablehlo", "images.npy", "logits.npy")


@pytest.fixture(scope="module")
def trained():
    """The digits network, its variables after three epochs, and images to test it."""
    digits = pytest.importorskip("jgn.examples.digits")
    train, test = digits.load()
    network = digits.Network(channels=16)
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to the power of an integer.
        steps = digits.steps_per_epoch(len(train.labels), 32)
        state = digits.create_state(network, jax.random.key(0), 0.003, 3 * steps)
        for epoch in range(3):
            key = jax.random.key(epoch)
            for batch in digits.shuffled_batches(key, len(train.labels), 32):
                state, *_ = digits.train_step(state, key, train.images[batch], train.labels[batch])
    return network, {"params": jax.device_get(state.params)}, test


def test_a_fresh_process_serves_a_trained_network_from_a_file(trained, tmp_path):
    pytest.importorskip("flatbuffers")
    network, variables, test = trained
    predict = jax.jit(lambda images: network.apply(variables, images))
    sizes = jax.export.symbolic_shape("batch, 8, 8, 1")
    exported = jax.export.export(predict)(jax.ShapeDtypeStruct(sizes, "float32"))
    (tmp_path / "digits.stablehlo").write_bytes(exported.serialize())
    np.save(tmp_path / "images.npy", test.images)
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SERVE), *FILES],
        check=True,
        cwd=tmp_path,
        # One device, as a server has, and not the eight of these tests.
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"},
    )
    logits, wanted = np.load(tmp_path / "logits.npy"), np.asarray(predict(test.images))
    np.testing.assert_allclose(logits, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    # Trained enough for the answers to mean something.
    assert (logits.argmax(-1) == test.labels).mean() > 0.7


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype.*float64:UserWarning")  # jax2onnx
def test_onnxruntime_computes_what_the_network_does(trained, tmp_path):
    """From the README's own lines, for any batch size, in operators that every runtime has."""
    pytest.importorskip("jax2onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    network, variables, test = trained
    wanted = np.asarray(network.apply(variables, test.images[:7]))
    readme = pathlib.Path(__file__).parent.parent / "README.md"
    (lines,) = re.findall(r"```py\n(.*?)```", readme.read_text(), re.DOTALL)
    names = {"jax": jax, "network": network, "variables": variables, "file": tmp_path / "digits.x"}
    with jax.numpy_dtype_promotion("standard"):
        exec(lines, names)
    assert {operator.domain for operator in names["model"].opset_import} == {""}
    session = onnxruntime.InferenceSession(tmp_path / "digits.onnx")
    for size in (1, 7):
        (logits,) = session.run(None, {session.get_inputs()[0].name: test.images[:size]})
        np.testing.assert_allclose(
            logits, wanted[:size], rtol=0, atol=1e-5 * np.abs(wanted[:size]).max()
        )
    # It leaves jax as it found it.
    np.testing.assert_array_equal(network.apply(variables, test.images[:7]), wanted)
