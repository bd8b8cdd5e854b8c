"""The examples of the reference pages and tutorials on group normalization, in jgn's terms."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from cases import random
from oracle import tolerance

import jgn

KEY = jax.random.key(0)
# Channels first, as those pages have it; jgn's own default is channels last.
FIRST = {"channel_axis": 1}


def normal(*shape, seed=0):
    return random(shape, seed, 0, 1)


def layer_output(x, **configuration):
    return jgn.GroupNorm(**FIRST, **configuration).init_with_output(KEY, x)[0]


def standardized(x, axes):
    """(x − μ) / √(σ² + 1e-5) over the given axes, in float64."""
    x = x.astype(np.float64)
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + 1e-5)


def assert_close(actual, wanted, elements):
    atol = tolerance("float32", elements) * np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


class TestTorchsReferencePage:
    x = normal(20, 6, 10, 10)

    def test_six_channels_in_three_groups(self):
        groups = self.x.reshape(20, 3, 2, 10, 10)
        wanted = standardized(groups, (2, 3, 4)).reshape(self.x.shape)
        assert_close(layer_output(self.x, num_groups=3), wanted, 200)

    def test_six_groups_are_instance_normalization(self):
        y = layer_output(self.x, num_groups=6)
        assert_close(y, standardized(self.x, (2, 3)), 100)
        flax = nn.InstanceNorm(feature_axes=1, epsilon=1e-5).init_with_output(KEY, self.x)[0]
        assert_close(y, flax, 100)

    def test_one_group_is_layer_normalization(self):
        y = layer_output(self.x, num_groups=1)
        assert_close(y, standardized(self.x, (1, 2, 3)), 600)
        flax = nn.LayerNorm(
            epsilon=1e-5, reduction_axes=(1, 2, 3), use_scale=False, use_bias=False
        ).init_with_output(KEY, self.x)[0]
        assert_close(y, flax, 600)

    def test_the_variance_is_biased(self):
        x = np.array([[1, 2, 3, 6]], np.float32)
        wanted = (x - 3) / np.sqrt(14 / 4 + 1e-5)
        assert_close(layer_output(x, num_groups=1), wanted, 4)

    def test_training_and_evaluation_share_the_statistics_of_the_input(self):
        layer = jgn.GroupNorm(3, **FIRST)
        variables = layer.init(KEY, self.x)
        assert variables.keys() == {"params"}, "no running averages"
        y, updated = layer.apply(variables, self.x, mutable=True)
        np.testing.assert_array_equal(y, layer.apply(variables, self.x))
        assert updated.keys() == {"params"}


class TestTheFirstTutorial:
    def test_four_groups_of_thirty_two_channels(self):
        x = normal(8, 32, 16, 16)
        y = layer_output(x, num_groups=4)
        wanted = standardized(x.reshape(8, 4, 8, 16, 16), (2, 3, 4)).reshape(x.shape)
        assert y.shape == (8, 32, 16, 16)
        assert_close(y, wanted, 2048)

    def test_instance_normalization_is_a_group_a_channel(self):
        x = normal(4, 32, 16, 16)
        y = layer_output(x, num_groups=32)
        assert_close(y, standardized(x, (2, 3)), 256)
        assert abs(float(y.mean())) < tolerance("float32", 256)

    def test_a_block_of_a_resnet(self):
        class ConvBlock(nn.Module):
            channels: int
            num_groups: int = 8

            @nn.compact
            def __call__(self, x):
                x = nn.Conv(self.channels, (3, 3))(x)
                return jgn.GroupNorm(self.num_groups, activation=nn.relu)(x)

        x = normal(2, 32, 32, 64)  # flax's convolutions have their channels last
        block = ConvBlock(128)
        y, variables = block.init_with_output(KEY, x)
        assert y.shape == (2, 32, 32, 128)
        assert jax.tree.map(np.shape, variables["params"]["GroupNorm_0"]) == {
            "scale": (128,),
            "bias": (128,),
        }
        convolved = np.asarray(
            nn.Conv(128, (3, 3)).apply({"params": variables["params"]["Conv_0"]}, x)
        )
        groups = standardized(convolved.reshape(2, 1024, 8, 16), (1, 3)).reshape(y.shape)
        assert_close(y, np.maximum(groups, 0), 16384)

    @pytest.mark.parametrize("num_groups", [1, 2, 4, 8, 32])
    def test_whatever_the_group_count_the_output_has_mean_0_and_variance_1(self, num_groups):
        x = normal(4, 32, 8, 8)
        y = np.asarray(layer_output(x, num_groups=num_groups), np.float64)
        groups = y.reshape(4, num_groups, -1)
        atol = tolerance("float32", groups.shape[-1]) * np.abs(y).max()
        np.testing.assert_allclose(groups.mean(-1), 0, atol=atol)
        # ε = 1e-5 beside a variance near 1
        np.testing.assert_allclose(groups.var(-1), 1, rtol=3e-5)


class TestTheSecondTutorial:
    x = normal(2, 8, 4, 4)

    def test_four_groups_of_eight_channels(self):
        y = layer_output(self.x, num_groups=4)
        wanted = standardized(self.x.reshape(2, 4, 2, 4, 4), (2, 3, 4)).reshape(self.x.shape)
        assert y.shape == (2, 8, 4, 4)
        assert_close(y, wanted, 32)

    def test_beside_batch_normalization_it_does_not_depend_on_the_batch(self):
        batch_norm = nn.BatchNorm(use_running_average=False, axis=1)
        of_batch = batch_norm.init_with_output(KEY, self.x)[0]
        of_one = batch_norm.init_with_output(KEY, self.x[:1])[0]
        assert of_batch.shape == layer_output(self.x, num_groups=4).shape
        assert np.abs(of_batch[:1] - of_one).max() > 0.1
        ours = layer_output(self.x, num_groups=4)[:1]
        assert_close(layer_output(self.x[:1], num_groups=4), ours, 32)

    @pytest.mark.parametrize("num_groups", [3, 5, 7, 16])
    def test_the_groups_must_divide_the_channels(self, num_groups):
        with pytest.raises(ValueError, match=f"num_groups={num_groups} for 8 channels"):
            layer_output(self.x, num_groups=num_groups)


class TestTheWorkedExample:
    """Two samples of four channels of 2 × 2, in two groups; every digit that it prints."""

    x = np.array(
        [
            [[[1, 6], [9, 4]], [[12, 18], [13, 11]], [[1, 2], [3, 4]], [[5, 6], [7, 8]]],
            [[[2, 7], [3, 8]], [[19, 17], [15, 11]], [[1, 3], [5, 7]], [[9, 11], [13, 15]]],
        ],
        np.float32,
    )
    printed = np.array(
        [
            [[-1.6199, -0.6381], [-0.0491, -1.0308]],
            [[0.5400, 1.7181], [0.7363, 0.3436]],
            [[-1.5275, -1.0911], [-0.6547, -0.2182]],
            [[0.2182, 0.6547], [1.0911, 1.5275]],
            [[-1.3908, -0.5479], [-1.2222, -0.3793]],
            [[1.4751, 1.1379], [0.8008, 0.1264]],
            [[-1.5275, -1.0911], [-0.6547, -0.2182]],
            [[0.2182, 0.6547], [1.0911, 1.5275]],
        ]
    ).reshape(x.shape)

    def test_the_output_to_every_printed_digit(self):
        y = layer_output(self.x, num_groups=2)
        np.testing.assert_array_equal(np.round(np.float64(y), 4), self.printed)

    def test_the_moments_by_hand(self):
        group = self.x[0, :2]
        mean, variance = group.mean(), group.var()
        assert (mean, variance) == (9.25, 25.9375)
        deviation = np.sqrt(variance + 1e-5)
        assert round(float(deviation), 4) == 5.0929
        y = layer_output(self.x, num_groups=2)
        assert_close(y[0, :2], (group - mean) / deviation, 8)


class TestLucidsPage:
    def test_thirty_two_channels_in_eight_groups(self):
        x = normal(4, 32, 64, 64)
        y = layer_output(x, num_groups=8)
        wanted = standardized(x.reshape(4, 8, 4, 64, 64), (2, 3, 4)).reshape(x.shape)
        assert y.shape == (4, 32, 64, 64)
        assert_close(y, wanted, 4 * 64 * 64)

    def test_a_sequence_in_one_group_is_layer_normalization(self):
        x = normal(16, 128, 200)
        y = layer_output(x, num_groups=1)
        assert y.shape == (16, 128, 200)
        assert_close(y, standardized(x, (1, 2)), 128 * 200)

    def test_scale_and_bias_have_one_value_a_channel(self):
        x = normal(4, 32, 8, 8)
        scale, bias = normal(32, seed=1), normal(32, seed=2)
        y = jgn.GroupNorm(8, **FIRST).apply({"params": {"scale": scale, "bias": bias}}, x)
        plain = standardized(x.reshape(4, 8, 4, 8, 8), (2, 3, 4)).reshape(x.shape)
        wanted = plain * scale.reshape(32, 1, 1) + bias.reshape(32, 1, 1)
        assert_close(y, wanted, 256)
        without = jgn.GroupNorm(8, use_scale=False, use_bias=False, **FIRST)
        assert without.init(KEY, x) == {}
        assert_close(without.apply({}, x), plain, 256)

    def test_its_repr_is_its_configuration(self):
        text = repr(jgn.GroupNorm(num_groups=8, epsilon=1e-5))
        assert "num_groups = 8" in text
        assert "epsilon = 1e-05" in text
