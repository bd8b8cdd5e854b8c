"""Parameters to and from other frameworks, bit for bit, and the real frameworks where installed."""

import collections
import itertools
import re
import sys
import types
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import random
from flax import nnx
from flax.core import FrozenDict
from oracle import Oracle, tolerance, wide

import jgn.nnx
from jgn.interop import convert_params, from_torch, to_torch

CHANNELS, GROUPS = 12, 3
NAMES = {
    "jgn": ("scale", "bias"),
    "flax": ("scale", "bias"),
    "torch": ("weight", "bias"),
    "lucid": ("weight", "bias"),
    "equinox": ("weight", "bias"),
    "haiku": ("scale", "offset"),
    "keras": ("gamma", "beta"),
}
EVERY_PAIR = [
    pytest.param(source, target, id=f"{source}-{target}") for source in NAMES for target in NAMES
]
DTYPES = ("float16", "bfloat16", "float32", "float64")


def module_like_torch(dtype="float32", **attributes):
    weight, bias = (random((CHANNELS,), seed, dtype=dtype) for seed in (1, 2))
    return types.SimpleNamespace(
        **{
            "num_groups": GROUPS,
            "num_channels": CHANNELS,
            "eps": 1e-3,
            "affine": True,
            "weight": weight,
            "bias": bias,
            **attributes,
        }
    )


def params_of(framework):
    return dict(
        zip(NAMES[framework], (random((CHANNELS,), 1), random((CHANNELS,), 2)), strict=True)
    )


STACKED = {"scale": random((2, CHANNELS)), "bias": random((2, CHANNELS))}


def assert_same_bits(actual, wanted):
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
    assert actual.tobytes() == wanted.tobytes()


def bits(tensor):
    """Those of a torch tensor, whatever its dtype."""
    torch = pytest.importorskip("torch")
    return bytes(tensor.detach().contiguous().view(torch.uint8).numpy())


# from_torch


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_object_with_torchs_attributes_becomes_a_layer(dtype):
    module = module_like_torch(dtype)
    layer, variables = from_torch(module)
    assert layer == jgn.GroupNorm(
        GROUPS, epsilon=1e-3, param_dtype=jnp.dtype(dtype), channel_axis=1
    )
    assert_same_bits(variables["params"]["scale"], module.weight)
    assert_same_bits(variables["params"]["bias"], module.bias)


def test_the_number_of_channels_may_be_numpys():
    module = module_like_torch(num_channels=np.int64(CHANNELS), num_groups=np.int64(2))
    layer, variables = from_torch(module)
    assert layer.num_groups == 2
    assert variables["params"]["scale"].shape == (CHANNELS,)


def test_a_number_of_channels_of_torchs_that_is_no_integer_is_named():
    with pytest.raises(TypeError, match=r"^num_channels must be an integer .*: got 12\.0\.$"):
        from_torch(module_like_torch(num_channels=12.0))


def test_the_layer_normalizes_channels_first():
    x, module = random((2, CHANNELS, 5, 4)), module_like_torch()
    layer, variables = from_torch(module)
    oracle = Oracle(x, GROUPS, module.weight, module.bias, epsilon=1e-3, channel_axis=1)
    np.testing.assert_allclose(
        layer.apply(variables, x), oracle.y, rtol=0, atol=10 * tolerance("float32", 80)
    )


@pytest.mark.parametrize(
    ("attributes", "learned"),
    [
        ({"affine": False, "weight": None, "bias": None}, []),
        ({"affine": False}, []),
        ({"bias": None}, ["scale"]),
        ({"weight": None}, ["bias"]),
    ],
)
def test_a_parameter_that_is_missing_is_not_learned(attributes, learned):
    layer, variables = from_torch(module_like_torch(**attributes))
    assert (layer.use_scale, layer.use_bias) == ("scale" in learned, "bias" in learned)
    assert list(variables.get("params", {})) == learned
    x = random((2, CHANNELS, 5))
    chex.assert_trees_all_equal_structs(layer.init(jax.random.key(0), x), variables)


def test_the_variables_are_copies():
    module = module_like_torch()
    _, variables = from_torch(module)
    module.weight[:] = 0
    assert np.all(variables["params"]["scale"] != 0)


class TensorLikeTorchs:
    """In a graph, on a device, and no array until it has left both."""

    def __init__(self, values, steps=("detach", "cpu", "numpy")):
        self.values = values
        self.steps = steps

    def __getattr__(self, name):
        if name != self.steps[0]:
            raise AttributeError(name)
        rest = self.steps[1:]
        return lambda: TensorLikeTorchs(self.values, rest) if rest else self.values


@pytest.mark.parametrize("steps", [("detach", "cpu", "numpy"), ("detach", "numpy"), ("numpy",)])
def test_a_tensor_is_taken_out_of_its_graph_and_off_its_device(steps):
    """torch's, lucid's, and the plainest."""
    module = module_like_torch()
    weight, bias = (TensorLikeTorchs(value, steps) for value in (module.weight, module.bias))
    variables = from_torch(module_like_torch(weight=weight, bias=bias))[1]
    chex.assert_trees_all_equal(variables, from_torch(module)[1])


@pytest.mark.parametrize(
    ("eps", "error", "shown"),
    [("x", TypeError, "'x'"), (-1.0, ValueError, "-1.0"), (np.inf, ValueError, "inf")],
)
def test_an_eps_that_is_none_is_named(eps, error, shown):
    with pytest.raises(error, match=rf"^epsilon must be .*: got {shown}\.$"):
        from_torch(module_like_torch(eps=eps))


def test_an_object_without_torchs_attributes_is_named():
    with pytest.raises(TypeError, match=r"a GroupNorm without num_channels, eps, affine, weight"):
        from_torch(jgn.GroupNorm(GROUPS))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tensor_with_strides_keeps_its_values(dtype):
    torch = pytest.importorskip("torch")
    wide_weight = torch.arange(2.0 * CHANNELS, dtype=getattr(torch, dtype))
    _, variables = from_torch(module_like_torch(weight=wide_weight[::2]))
    assert_same_bits(variables["params"]["scale"], np.arange(0, 2 * CHANNELS, 2, jnp.dtype(dtype)))


@pytest.mark.parametrize("shape", [(CHANNELS, 1), (6,), ()])
def test_a_parameter_of_another_shape_is_named(shape):
    with pytest.raises(ValueError, match=r"^bias must have shape \(12,\), one value a chann"):
        from_torch(module_like_torch(bias=np.zeros(shape)))


def test_groups_that_do_not_divide_are_named_at_once():
    with pytest.raises(ValueError, match=r"^num_groups must divide the channels: got num_groups=5"):
        from_torch(module_like_torch(num_groups=5))


@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        ({}, "{}"),
        (["a"] * CHANNELS, "['a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a', 'a']"),
        (np.array([None] * CHANNELS), f"array([{'None, ' * 8}None…"),
    ],
)
def test_a_parameter_that_is_no_array_of_numbers_is_named(bad, shown):
    message = f"scale must be an array of numbers: got {shown}."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        from_torch(module_like_torch(weight=bad))


# to_torch


@pytest.mark.parametrize("dtype", [*DTYPES, "complex64"])
@pytest.mark.parametrize("learned", [(), ("scale",), ("bias",), ("scale", "bias")])
def test_torch_and_back_keeps_every_bit(dtype, learned):
    pytest.importorskip("torch")
    layer = jgn.GroupNorm(
        GROUPS,
        epsilon=0.1,
        param_dtype=jnp.dtype(dtype if learned else "float32"),
        use_scale="scale" in learned,
        use_bias="bias" in learned,
        channel_axis=1,
    )
    params = {name: random((CHANNELS,), len(name), dtype=dtype) for name in learned}
    variables = {"params": params} if params else {}
    module = to_torch(layer, variables, num_channels=CHANNELS)
    assert module.affine == bool(learned)
    again, its_variables = from_torch(module)
    assert again == layer
    jax.tree.map(assert_same_bits, its_variables, variables)


@pytest.mark.parametrize("dtype", DTYPES)
def test_jgn_and_back_keeps_every_bit(dtype):
    torch = pytest.importorskip("torch")
    module = torch.nn.GroupNorm(GROUPS, CHANNELS, eps=1e-4, dtype=getattr(torch, dtype))
    # Not a number, infinities, zeros of both signs, denormals: every pattern of bits.
    patterns = torch.randint(0, 256, (CHANNELS * module.weight.element_size(),), dtype=torch.uint8)
    module.weight.data = patterns.view(module.weight.dtype)
    again = to_torch(*from_torch(module))
    assert repr(again) == repr(module)
    for name in ("weight", "bias"):
        assert bits(getattr(again, name)) == bits(getattr(module, name))
        assert getattr(again, name).requires_grad


def test_parameters_that_carry_axis_names_lose_them():
    pytest.importorskip("torch")
    init = nn.with_partitioning(nn.initializers.ones, ("channels",))
    layer = jgn.GroupNorm(GROUPS, scale_init=init, bias_init=init)
    variables = layer.init(jax.random.key(0), random((1, CHANNELS)))
    assert to_torch(layer, variables).weight.tolist() == [1.0] * CHANNELS


def test_group_size_and_frozen_variables_are_understood():
    pytest.importorskip("torch")
    layer = jgn.GroupNorm(num_groups=None, group_size=4)
    module = to_torch(layer, FrozenDict({"params": params_of("jgn")}))
    assert (module.num_groups, module.num_channels) == (3, CHANNELS)


@pytest.mark.parametrize("epsilon", [1, np.float32(0.5), np.array(0.5), jnp.float32(0.5)], ids=type)
def test_torch_gets_epsilon_as_the_number_that_it_wants(epsilon):
    pytest.importorskip("torch")
    module = to_torch(jgn.GroupNorm(GROUPS, epsilon=epsilon), {"params": params_of("jgn")})
    assert type(module.eps) is float
    assert module.eps == epsilon


def test_an_epsilon_that_is_none_is_named():
    pytest.importorskip("torch")
    with pytest.raises(ValueError, match=r"^epsilon must be finite and not negative: got -1\.0\.$"):
        to_torch(jgn.GroupNorm(GROUPS, epsilon=-1.0), {"params": params_of("jgn")})


@pytest.mark.parametrize(
    "layer", [nn.GroupNorm(GROUPS), jgn.nnx.GroupNorm(CHANNELS, GROUPS, rngs=nnx.Rngs(0)), None]
)
def test_another_layer_is_named(layer):
    with pytest.raises(TypeError, match=r"^layer must be a jgn\.GroupNorm: got .*; write jgn\.Gr"):
        to_torch(layer, {"params": params_of("jgn")})


def identity(x):
    return x


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("reduction_axes", (1, 2)),
        ("activation", identity),
        ("axis_name", "batch"),
        ("axis_index_groups", ((0,), (1,))),
        ("dtype", jnp.float32),
    ],
)
def test_an_option_that_torch_has_not_is_named(option, value):
    layer = jgn.GroupNorm(GROUPS, **{option: value})
    with pytest.raises(
        ValueError, match=rf"^layer must have no {option}, .* layer\.clone\({option}"
    ):
        to_torch(layer, {"params": params_of("jgn")})


@pytest.mark.parametrize(
    ("options", "variables", "num_channels", "message"),
    [
        *(
            ({}, variables, None, rf"^variables must hold .* 'bias'\]}}: got {re.escape(shown)}\.$")
            for variables, shown in (
                ({}, "{}"),
                (None, "None"),
                ([1, 2], "[(), ()]"),
                ({"params": 3}, "{'params': ()}"),
                ({"params": None}, "{'params': None}"),
            )
        ),
        (
            {"use_bias": False},
            {"params": params_of("jgn")},
            None,
            r"\['scale'\]}: got {'params': {'bias': \(",
        ),
        (
            {},
            {"params": {"GroupNorm_0": params_of("jgn")}},
            None,
            r"\['scale', 'bias'\]}: got {'params': {'GroupNorm_0': {",
        ),
        (
            {},
            params_of("jgn"),
            None,
            r"{\"params\": \['scale', 'bias'\]}: got {'bias': \(12,\), 'scale': \(12,\)}\.$",
        ),
        (
            {},
            {"params": {f"layer_{i}": object() for i in range(99)}},
            None,
            r"\['scale', 'bias'\]}: got {'params': {'layer_0': \(\), .{1,40}…\.$",
        ),
        ({"use_bias": False, "use_scale": False}, {}, None, "number of channels must be known"),
        ({}, {"params": params_of("jgn")}, 16, r"num_channels=16 and the parameters' shapes {'sca"),
        (
            {},
            {"params": STACKED},
            None,
            r"each of shape \(channels,\), .* {'scale': \(2, 12",
        ),
        ({"num_groups": 5}, {"params": params_of("jgn")}, None, "num_groups must divide the chan"),
    ],
)
def test_variables_that_are_not_the_layers_are_named(options, variables, num_channels, message):
    layer = jgn.GroupNorm(**{"num_groups": GROUPS, **options})
    with pytest.raises(ValueError, match=message):
        to_torch(layer, variables, num_channels=num_channels)


def test_a_number_of_channels_that_is_no_integer_is_named():
    layer = jgn.GroupNorm(GROUPS, use_bias=False, use_scale=False)
    with pytest.raises(TypeError, match=r"^num_channels must be an integer .*: got 12\.0\.$"):
        to_torch(layer, {}, num_channels=12.0)


@pytest.mark.parametrize("order", "<>")
def test_a_parameter_of_either_byte_order_keeps_its_values(order):
    scale, bias = np.arange(8, dtype=f"{order}f4"), np.ones(8, f"{order}f4")
    module = types.SimpleNamespace(
        num_groups=2, num_channels=8, eps=1e-5, affine=True, weight=scale, bias=bias
    )
    layer, variables = from_torch(module)
    x = random((2, 8, 3))
    wanted = jgn.group_norm(x, 2, np.arange(8.0, dtype="f4"), np.ones(8, "f4"), channel_axis=1)
    np.testing.assert_array_equal(layer.apply(variables, x), wanted)
    pytest.importorskip("torch")
    back = to_torch(jgn.GroupNorm(2), {"params": {"scale": scale, "bias": bias}})
    assert back.weight.tolist() == list(range(8))


def test_a_parameter_that_torch_cannot_learn_is_named():
    pytest.importorskip("torch")
    params = {"scale": np.arange(8), "bias": np.zeros(8, np.float32)}
    with pytest.raises(TypeError, match=r"^scale must be floating or complex: got int64\.$"):
        to_torch(jgn.GroupNorm(2), {"params": params})


def test_without_torch_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"to_torch needs torch.*convert_params\(params, source="):
        to_torch(jgn.GroupNorm(GROUPS), {"params": params_of("jgn")})


# convert_params


class Pair(NamedTuple):
    first: object
    second: object


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("source", "target"), EVERY_PAIR)
def test_every_framework_to_every_other_and_back_keeps_every_bit(source, target, dtype):
    """Infinities, zeros of both signs, denormals, what is not a number: every pattern of bits."""
    size = CHANNELS * jnp.dtype(dtype).itemsize
    scale, bias = (
        np.frombuffer(np.random.default_rng(seed).bytes(size), jnp.dtype(dtype)) for seed in (1, 2)
    )
    bits = scale.tobytes(), bias.tobytes()
    scale_name, bias_name = NAMES[source]
    flat = f"0.norm.{scale_name}", f"0.norm.{bias_name}"
    norm = {scale_name: scale, bias_name: bias}
    params = {"blocks": [{"norm": norm}], "joined": dict(zip(flat, norm.values(), strict=True))}

    there = convert_params(params, source=source, target=target)
    assert list(there["blocks"][0]["norm"]) == list(NAMES[target])
    assert list(there["joined"]) == [f"0.norm.{name}" for name in NAMES[target]]
    back = convert_params(there, source=target, target=source)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    assert list(back["joined"]) == list(flat)
    for leaves in (there["blocks"][0]["norm"], there["joined"], back["joined"], norm):
        for leaf, before, its_bits in zip(leaves.values(), (scale, bias), bits, strict=True):
            assert leaf is before
            assert leaf.tobytes() == its_bits


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_round_trip_through_all_keeps_every_leaf(dtype):
    scale, bias = random((CHANNELS,), 1, dtype=dtype), random((CHANNELS,), 2, dtype=dtype)
    params = {"norm": {"scale": scale, "bias": bias}}
    frameworks = [*NAMES, "jgn"]
    for source, target in itertools.pairwise(frameworks):
        params = convert_params(params, source=source, target=target)
    assert params["norm"]["scale"] is scale
    assert params["norm"]["bias"] is bias


def test_every_container_is_kept_and_searched():
    norm = params_of("torch")
    tree = {
        "list": [norm, 1],
        "tuple": (norm, None),
        "named": Pair(norm, "weight"),
        "frozen": FrozenDict({"norm": norm}),
        "ordered": collections.OrderedDict(norm),
        "empty": {},
        "7": {7: 1.0},
    }
    wanted = dict(zip(("gamma", "beta"), norm.values(), strict=True))
    converted = convert_params(tree, source="torch", target="keras")
    chex.assert_trees_all_equal(
        {key: value for key, value in converted.items() if key != "named"},
        {
            "list": [wanted, 1],
            "tuple": (wanted, None),
            "frozen": FrozenDict({"norm": wanted}),
            "ordered": collections.OrderedDict(wanted),
            "empty": {},
            "7": {7: 1.0},
        },
    )
    assert isinstance(converted["named"], Pair)
    assert converted["named"].second == "weight"
    for key in tree:
        assert type(converted[key]) is type(tree[key])
    assert "weight" in norm


def test_an_optimizers_state_is_renamed_with_its_parameters():
    ours = {"norm": params_of("jgn")}
    theirs = convert_params(ours, source="jgn", target="haiku")
    optimizer = optax.adam(1e-3)
    chex.assert_trees_all_equal(
        convert_params(optimizer.init(ours), source="jgn", target="haiku"), optimizer.init(theirs)
    )


def test_other_layers_stay_as_they_are():
    others = {
        "linear": {"weight": random((5, CHANNELS)), "bias": random((5,))},
        "convolution": {"weight": random((4, 4, 3)), "bias": random((4,))},
        "linear_without_bias": {"weight": random((5, 4))},
        "a_number": {"weight": random(())},
        "without_weight": {"bias": random((4,))},
        "batch_norm": {
            "weight": random((4,)),
            "bias": random((4,)),
            "running_mean": random((4,)),
        },
        "of_different_sizes": {"weight": random((4,)), "bias": random((3,))},
        "of_no_shape": {"weight": "a", "bias": "b"},
        "modules": {"weight": {"kernel": random((4,))}, "bias": {"kernel": random((4,))}},
    }
    converted = convert_params(others, source="torch", target="keras")
    assert jax.tree.structure(converted) == jax.tree.structure(others)
    assert all(
        a is b for a, b in zip(jax.tree.leaves(converted), jax.tree.leaves(others), strict=True)
    )


@pytest.mark.parametrize("source", NAMES)
def test_a_scale_of_rank_1_without_a_bias_is_a_normalizations(source):
    scale = random((CHANNELS,))
    converted = convert_params({NAMES[source][0]: scale}, source=source, target="keras")
    assert list(converted) == ["gamma"]
    assert converted["gamma"] is scale


def test_stacked_parameters_are_known_by_their_equal_shapes():
    stacked = {
        "norm": {"weight": random((6, CHANNELS)), "bias": random((6, CHANNELS))},
        "linear": {"weight": random((6, 5, CHANNELS)), "bias": random((6, 5))},
    }
    converted = convert_params(stacked, source="equinox", target="jgn")
    assert [list(converted[key]) for key in stacked] == [["scale", "bias"], ["weight", "bias"]]


def test_parameters_that_carry_axis_names_are_known_too():
    values = nn.Partitioned(random((CHANNELS,)), ("channels",))
    converted = convert_params({"scale": values, "bias": values}, source="flax", target="keras")
    assert converted == {"gamma": values, "beta": values}


@pytest.mark.parametrize("separator", [".", "/"])
def test_joined_names_keep_what_stands_before(separator):
    names = ("0.weight", "0.bias", "1.2.weight", "1.2.bias", "weight", "bias", "1.mean", "1.bias")
    shapes = ((4, 3), (4,), *[(CHANNELS,)] * 6)
    flat = {
        name.replace(".", separator): random(shape)
        for name, shape in zip(names, shapes, strict=True)
    }
    converted = convert_params(flat, source="torch", target="haiku")
    wanted = (
        "0.weight",
        "0.bias",
        "1.2.scale",
        "1.2.offset",
        "scale",
        "offset",
        "1.mean",
        "1.bias",
    )
    assert list(converted) == [name.replace(".", separator) for name in wanted]


def test_a_tuple_of_names_is_understood_as_joined_names_are():
    names = [("a", "scale"), ("a", "bias"), ("a", "b", "kernel"), ("scale",), ("bias",), ()]
    flat = {name: random((4, 3) if "kernel" in name else (CHANNELS,)) for name in names}
    converted = convert_params(flat, source="jgn", target="keras")
    wanted = [("a", "gamma"), ("a", "beta"), ("a", "b", "kernel"), ("gamma",), ("beta",), ()]
    assert list(converted) == wanted
    seen = []
    convert_params([flat], source="jgn", target="keras", where=seen.append)
    assert seen == [(0, "a"), (0,)]


def test_where_chooses_instead_of_the_rule():
    tree = {
        "blocks": [{"norm": {"bias": 1.0}, "linear": {"bias": 2.0}}],
        "norm.0.bias": 3.0,
        "linear.bias": 4.0,
        "last": params_of("torch"),
    }
    seen = []

    def where(path):
        seen.append(path)
        return "norm" in path or path == ("norm.0",)

    converted = convert_params(tree, source="torch", target="keras", where=where)
    assert converted == {
        "blocks": [{"norm": {"beta": 1.0}, "linear": {"bias": 2.0}}],
        "norm.0.beta": 3.0,
        "linear.bias": 4.0,
        "last": tree["last"],
    }
    assert sorted(seen, key=str) == sorted(
        [("blocks", 0, "norm"), ("blocks", 0, "linear"), ("norm.0",), ("linear",), ("last",)],
        key=str,
    )


def test_modules_that_are_called_like_parameters_are_none():
    tree = {"weight": {"kernel": 1.0}, "bias": [{"bias": 2.0}]}
    converted = convert_params(tree, source="torch", target="keras", where=lambda path: True)
    assert converted == {"weight": {"kernel": 1.0}, "bias": [{"beta": 2.0}]}
    several = {"weight": (1.0, 2.0), "bias": 3.0}
    assert (
        convert_params(several, source="torch", target="keras", where=lambda path: True) == several
    )


def test_a_mapping_with_its_own_constructor_is_kept():
    tree = collections.defaultdict(list, {"norm": params_of("jgn")})
    converted = convert_params(tree, source="jgn", target="keras")
    assert converted.default_factory is list
    assert list(converted["norm"]) == ["gamma", "beta"]
    assert list(tree["norm"]) == ["scale", "bias"]


def test_a_state_dict_of_torchs_goes_there_and_back_with_its_versions():
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, CHANNELS, 3),
        torch.nn.GroupNorm(GROUPS, CHANNELS),
        torch.nn.BatchNorm2d(CHANNELS),
        torch.nn.PReLU(CHANNELS),  # its weight looks like a normalization's
    )
    before = network.state_dict()
    ours = convert_params(before, source="torch", target="jgn")
    assert [name for name in ours if name not in before] == ["1.scale", "3.scale"]
    chosen = convert_params(before, source="torch", target="jgn", where=lambda path: "1" in path)
    assert [name for name in chosen if name not in before] == ["1.scale"]
    after = convert_params(ours, source="jgn", target="torch")
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert after._metadata == before._metadata
    network.load_state_dict(after)


@pytest.mark.parametrize("unknown", ["caffe", None, ["torch"]])
@pytest.mark.parametrize("argument", ["source", "target"])
def test_an_unknown_framework_is_named_with_the_known(argument, unknown):
    arguments = {"source": "jgn", "target": "jgn", argument: unknown}
    known = "jgn, flax, torch, lucid, equinox, haiku, keras"
    message = re.escape(f"{argument} must be one of {known}: got {unknown!r}.")
    with pytest.raises(ValueError, match=f"^{message}$"):
        convert_params({}, **arguments)


# The real ones


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torchs_module_and_its_layer_agree_with_their_gradients(dtype):
    torch = pytest.importorskip("torch")
    module = torch.nn.GroupNorm(GROUPS, CHANNELS, eps=1e-3)
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(random((CHANNELS,), 1)))
        module.bias.copy_(torch.from_numpy(random((CHANNELS,), 2)))
    module = module.to(getattr(torch, dtype))
    x, cotangent = (random((2, CHANNELS, 5, 4), seed) for seed in (3, 4))
    theirs = [torch.from_numpy(a).to(getattr(torch, dtype)) for a in (x, cotangent)]
    theirs[0].requires_grad_()
    y = module(theirs[0])
    y.backward(theirs[1])

    layer, variables = from_torch(module)
    ours = [jnp.asarray(a, dtype) for a in (x, cotangent)]
    y_of_ours, vjp = jax.vjp(layer.apply, variables, ours[0])
    in_params, in_x = vjp(ours[1])
    # One rounding of the results each, and sums of up to 40 · 2 terms of up to 10 in float32.
    exact = 4 * jnp.finfo(dtype).eps
    for actual, wanted in (
        (y_of_ours, y),
        (in_x, theirs[0].grad),
        (in_params["params"]["scale"], module.weight.grad),
        (in_params["params"]["bias"], module.bias.grad),
    ):
        assert actual.dtype == dtype
        wanted = wanted.detach().double().numpy()
        np.testing.assert_allclose(
            wide(actual), wanted, rtol=exact, atol=float(exact) * np.abs(wanted).max()
        )
