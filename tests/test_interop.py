"""Parameters to and from other frameworks, to the bit; with the frameworks where installed."""

import sys
import types

import chex
import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import random
from oracle import Oracle, tolerance

import jgn
from jgn.interop import NAMES, convert_params, from_torch, to_torch

SCALE, BIAS = random((8,), 1), random((8,), 2)


def lookalike(weight=SCALE, bias=BIAS, **attributes):
    """What lucid's module has."""
    attributes = {"num_groups": 4, "num_channels": 8, "eps": 1e-3, "affine": True, **attributes}
    return types.SimpleNamespace(weight=weight, bias=bias, **attributes)


def assert_close(actual, wanted, elements):
    atol = tolerance("float32", elements) * np.abs(wanted).max()
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


@pytest.mark.parametrize("source", NAMES)
@pytest.mark.parametrize("target", NAMES)
def test_a_tree_goes_there_and_back_with_the_same_leaves(source, target):
    names = NAMES[source]
    params = {
        "norm": {names.scale: SCALE, names.bias: BIAS},
        "layers": [
            {"conv": {"kernel": np.ones((3, 3, 8, 8)), "bias": BIAS}},
            ({names.scale: jnp.ones(4, jnp.bfloat16)}, None, 3),
        ],
        "dense": {"weight": np.ones((8, 2)), "bias": np.zeros(2)},
        "frozen": flax.core.freeze({"inner": {names.scale: SCALE, names.bias: BIAS}}),
    }
    there = convert_params(params, source=source, target=target)
    assert set(there["norm"]) == set(NAMES[target])
    assert set(there["frozen"]["inner"]) == set(NAMES[target])
    assert isinstance(there["frozen"], flax.core.FrozenDict)
    assert there["norm"][NAMES[target].scale] is SCALE
    assert there["norm"][NAMES[target].bias] is BIAS
    assert set(there["layers"][1][0]) == {NAMES[target].scale}
    assert there["dense"] == params["dense"], "a matrix is no scale"
    assert there["layers"][0] == params["layers"][0]
    back = convert_params(there, source=target, target=source)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    for leaf, original in zip(jax.tree.leaves(back), jax.tree.leaves(params), strict=True):
        assert leaf is original


def test_what_only_looks_like_one_stays():
    params = {
        "unequal": {"weight": np.ones(3), "bias": np.ones(4)},
        "more": {"weight": np.ones(3), "bias": np.ones(3), "running_mean": np.ones(3)},
        "bias alone": {"bias": np.ones(3)},
        "empty": {},
    }
    assert convert_params(params, source="torch", target="keras") == params


def test_where_chooses_by_path():
    params = {"bn": {"weight": SCALE, "bias": BIAS}, "gn": [{"weight": SCALE, "bias": BIAS}]}
    converted = convert_params(
        params, source="torch", target="flax", where=lambda path: path[0] == "gn"
    )
    assert converted["bn"].keys() == {"weight", "bias"}
    assert converted["gn"][0].keys() == {"scale", "bias"}


def test_an_unknown_framework_is_named():
    text = (
        "^source must be one of flax, jgn, torch, lucid, equinox, haiku, keras: got 'tensorflow'.$"
    )
    with pytest.raises(ValueError, match=text):
        convert_params({}, source="tensorflow", target="flax")
    with pytest.raises(ValueError, match=text.replace("source", "target")):
        convert_params({}, source="flax", target="tensorflow")


def test_anything_with_torchs_attributes_will_do():
    layer, variables = from_torch(lookalike())
    assert (layer.num_groups, layer.epsilon, layer.channel_axis) == (4, 1e-3, 1)
    x = random((2, 8, 5))
    wanted = Oracle(x, 4, SCALE, BIAS, epsilon=1e-3, channel_axis=1).y
    assert_close(layer.apply(variables, x), wanted, 10)
    chex.assert_trees_all_equal(variables, {"params": {"scale": SCALE, "bias": BIAS}})


def test_without_parameters_or_with_a_scale_alone():
    layer, variables = from_torch(lookalike(None, None, affine=False))
    assert variables == {}
    assert layer.init(jax.random.key(0), random((2, 8, 5))) == {}
    layer, variables = from_torch(lookalike(bias=None))
    assert variables["params"].keys() == {"scale"}
    assert (layer.use_scale, layer.use_bias) == (True, False)


def test_what_lacks_an_attribute_is_told_which():
    with pytest.raises(
        TypeError, match=r"^module must have .* got a SimpleNamespace without num_groups, eps\.$"
    ):
        from_torch(types.SimpleNamespace(num_channels=8, affine=True, weight=None, bias=None))


def test_without_torch_the_way_back_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="torch"):
        to_torch(jgn.GroupNorm(4), {"params": {"scale": SCALE, "bias": BIAS}})


@pytest.mark.parametrize(
    "option",
    [
        {"activation": nn.silu},
        {"axis_name": "batch"},
        {"reduction_axes": (1, 2)},
        {"dtype": jnp.bfloat16},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_torch_cannot_do_is_refused(option):
    with pytest.raises(ValueError, match=f"^torch.nn.GroupNorm has no {next(iter(option))}: got "):
        to_torch(jgn.GroupNorm(4, **option), {})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("with_bias", [False, True])
def test_torch_there_and_back_to_the_bit(dtype, with_bias):
    torch = pytest.importorskip("torch")
    module = torch.nn.GroupNorm(4, 8, eps=1e-4, dtype=getattr(torch, dtype))
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(SCALE))
        module.bias.copy_(torch.from_numpy(BIAS))
    if not with_bias:
        module.register_parameter("bias", None)
    with jax.enable_x64(dtype == "float64"):
        layer, variables = from_torch(module)
        assert layer.param_dtype == dtype
        back = to_torch(layer, variables)
    assert (back.num_groups, back.num_channels, back.eps) == (4, 8, 1e-4)
    assert back.weight.dtype == module.weight.dtype
    assert torch.equal(back.weight, module.weight)
    assert (back.bias is None) == (not with_bias)
    assert not with_bias or torch.equal(back.bias, module.bias)


def test_a_group_size_and_no_parameters_go_to_torch():
    pytest.importorskip("torch")
    layer = jgn.GroupNorm(num_groups=None, group_size=2, use_scale=False, use_bias=False)
    module = to_torch(layer, {}, num_channels=8)
    assert (module.num_groups, module.affine) == (4, False)
    with pytest.raises(ValueError, match=r"^num_channels must be given"):
        to_torch(layer, {})


class Twin(nn.Module):
    """The torch network below in flax's terms, channels last."""

    norm: jgn.GroupNorm

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3))(x)
        x = nn.relu(self.norm(x))
        return nn.Dense(5)(x.mean((1, 2)))


def test_a_whole_network_of_torch_has_a_twin_with_the_same_outputs_and_gradients():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1),
        torch.nn.GroupNorm(4, 8),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(8, 5),
    )
    x = random((2, 3, 6, 7))
    cotangent = random((2, 5), 1)
    x_torch = torch.tensor(x, requires_grad=True)
    y_torch = network(x_torch)
    y_torch.backward(torch.from_numpy(cotangent))

    def from_network(of):
        state = {name: of(parameter) for name, parameter in network.named_parameters()}
        return {
            "Conv_0": {"kernel": state["0.weight"].transpose(2, 3, 1, 0), "bias": state["0.bias"]},
            "norm": convert_params(
                {"weight": state["1.weight"], "bias": state["1.bias"]},
                source="torch",
                target="flax",
            ),
            "Dense_0": {"kernel": state["5.weight"].T, "bias": state["5.bias"]},
        }

    layer, _ = from_torch(network[1])
    twin = Twin(layer.clone(channel_axis=-1))
    params = from_network(lambda parameter: parameter.detach().numpy())
    last = np.moveaxis(x, 1, -1)
    y, vjp = jax.vjp(lambda params, x: twin.apply({"params": params}, x), params, last)
    assert_close(y, y_torch.detach().numpy(), 84)
    params_gradient, x_gradient = vjp(cotangent)
    assert_close(np.moveaxis(x_gradient, -1, 1), x_torch.grad.numpy(), 84)
    wanted = from_network(lambda parameter: parameter.grad.numpy())
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(wanted))
    for ours, theirs in zip(jax.tree.leaves(params_gradient), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance("float32", 84) * largest)


def test_haikus_parameters():
    hk = pytest.importorskip("haiku")
    x = random((2, 5, 8))
    function = hk.without_apply_rng(hk.transform(lambda x: hk.GroupNorm(4)(x)))
    params = {"group_norm": {"scale": SCALE, "offset": BIAS}}
    assert jax.tree.map(np.shape, function.init(jax.random.key(0), x)) == jax.tree.map(
        np.shape, params
    )
    converted = convert_params(params, source="haiku", target="jgn")
    y = jgn.GroupNorm(4).apply({"params": converted["group_norm"]}, x)
    assert_close(y, function.apply(params, x), 10)


def test_equinoxs_parameters():
    eqx = pytest.importorskip("equinox")
    module = eqx.nn.GroupNorm(4, 8)
    module = eqx.tree_at(lambda m: (m.weight, m.bias), module, (jnp.array(SCALE), jnp.array(BIAS)))
    params = convert_params(
        {"weight": module.weight, "bias": module.bias}, source="equinox", target="jgn"
    )
    x = random((2, 8, 5))
    y = jgn.GroupNorm(4, channel_axis=1).apply({"params": params}, x)
    with jax.numpy_dtype_promotion("standard"):
        assert_close(y, jax.vmap(module)(x), 10)
