"""The README's page on moving here and back: its table, its snippets, and whole networks.

What is compared with a framework is skipped where that is not installed.
"""

import functools
import inspect
import pathlib
import re
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import random
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from oracle import Oracle, tolerance

import jgn
import jgn.nnx
from jgn.interop import convert_params

README = pathlib.Path(__file__).parent.parent / "README.md"
PAGE = README.read_text().partition("## Moving here, and back")[2].partition("\n## ")[0]


def table():
    """By framework, each column's cell."""
    header, _, *rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if line.startswith("|")
    ]
    return {row[0].strip("`*"): dict(zip(header[1:], row[1:], strict=True)) for row in rows}


TABLE = table()
EVERY_FRAMEWORK = pytest.mark.parametrize("framework", TABLE)
EVERY_OTHER = pytest.mark.parametrize("framework", [name for name in TABLE if name != "jgn"])
CHANNELS, GROUPS = 64, 8
AXES = {"last": -1, "axis 1": 1, "axis 0, no batch axis": 0}
SCALE, BIAS = random((CHANNELS,), 1), random((CHANNELS,), 2)


@pytest.fixture(autouse=True)
def _promotions_as_users_have_them():
    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_table_has_every_framework():
    assert list(TABLE) == ["jgn", "flax.linen", "flax.nnx", "torch", "haiku", "equinox", "keras"]
    assert list(TABLE["jgn"]) == [
        *("epsilon", "groups", "channels", "output dtype", "parameters", "here"),
    ]


def names_after(framework):
    """What a user has typed who followed the README from torch's section to this one's."""
    end = PAGE.index("\n\n**", PAGE.index(f"**{framework}.**")) if framework != "keras" else None
    lines = PAGE[PAGE.index("**torch.**") : end].splitlines()
    code = "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... ")))
    names = {"jax": jax, "jnp": jnp, "jgn": jgn}
    exec(code, names)
    return types.SimpleNamespace(**names)


def assert_same_bits(actual, wanted):
    actual, wanted = np.asarray(actual), np.asarray(wanted)
    assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape)
    assert actual.tobytes() == wanted.tobytes()


# One layer


class Layer(NamedTuple):
    """A framework's own layer of 64 channels in 8 groups, all else at its defaults."""

    constructor: Callable
    initial: Callable[[jax.Array], dict[str, Any]]  # the parameters by name, for a first x
    apply: Callable[[dict[str, np.ndarray], jax.Array], jax.Array]


def of_linen(layer):
    return Layer(
        type(layer),
        lambda x: layer.init(jax.random.key(0), x)["params"],
        lambda params, x: layer.apply({"params": params}, x),
    )


def of_nnx():
    layer = nnx.GroupNorm(CHANNELS, GROUPS, rngs=nnx.Rngs(0))

    def apply(params, x):
        nnx.update(layer, jax.tree.map(jnp.asarray, params))
        return layer(x)

    return Layer(nnx.GroupNorm, lambda x: nnx.to_pure_dict(nnx.state(layer)), apply)


def of_torch():
    torch = pytest.importorskip("torch")
    layer = torch.nn.GroupNorm(GROUPS, CHANNELS)

    def apply(params, x):
        tensors = {name: torch.from_numpy(values) for name, values in params.items()}
        x = jax.device_put(x, jax.devices("cpu")[0])
        y = torch.func.functional_call(layer, tensors, torch.from_dlpack(x))
        return jnp.from_dlpack(y.detach())

    return Layer(torch.nn.GroupNorm, lambda x: dict(layer.named_parameters()), apply)


def of_haiku(*arguments):
    hk = pytest.importorskip("haiku")
    network = hk.without_apply_rng(hk.transform(lambda x: hk.GroupNorm(GROUPS, *arguments)(x)))
    return Layer(
        hk.GroupNorm,
        lambda x: network.init(None, x)["group_norm"],
        lambda params, x: network.apply({"group_norm": params}, x),
    )


def of_equinox():
    eqx = pytest.importorskip("equinox")
    layer = eqx.nn.GroupNorm(GROUPS, CHANNELS)

    def apply(params, x):
        theirs = eqx.tree_at(
            lambda layer: [getattr(layer, name) for name in params],
            layer,
            [jnp.asarray(values) for values in params.values()],
        )
        return theirs(x)

    return Layer(
        eqx.nn.GroupNorm,
        lambda x: {path[0].name: leaf for path, leaf in jax.tree.leaves_with_path(layer)},
        apply,
    )


def of_keras(**options):
    keras = pytest.importorskip("keras")

    def built(x):
        layer = keras.layers.GroupNormalization(**{"groups": GROUPS, **options})
        layer.build(x.shape)
        return layer

    def apply(params, x):
        layer = built(x)
        for variable in layer.variables:
            variable.assign(params[variable.name])
        return layer(x)

    return Layer(
        keras.layers.GroupNormalization,
        lambda x: {variable.name: variable.value for variable in built(x).variables},
        apply,
    )


LAYERS = {
    "jgn": lambda: of_linen(jgn.GroupNorm(GROUPS)),
    "flax.linen": lambda: of_linen(nn.GroupNorm(GROUPS)),
    "flax.nnx": of_nnx,
    "torch": of_torch,
    "haiku": of_haiku,
    "equinox": of_equinox,
    "keras": of_keras,
}


def axis_of(framework):
    return AXES[TABLE[framework]["channels"].partition(", or")[0]]


def x_for(framework, dtype="float32"):
    """In the framework's layout, and so small that an epsilon is seen in the result."""
    x = random((2, 5, 6, CHANNELS), mean=0, deviation=0.02)
    if axis_of(framework) == 0:
        x = x[0]
    return jnp.asarray(np.moveaxis(x, -1, axis_of(framework)), dtype)


def wanted_of(framework, **options):
    """y in float64, as the table says that the framework's layer computes it."""
    x = np.asarray(x_for(framework))
    axes = {"channel_axis": axis_of(framework)}
    epsilon = float(TABLE[framework]["epsilon"])
    return Oracle(x, GROUPS, SCALE, BIAS, **{"epsilon": epsilon, **axes, **options}).y


def assert_equal_but_for_rounding(actual, wanted):
    atol = 10 * tolerance("float32", 8 * 30)  # scale times y is up to 10
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=atol)


def params_for(framework):
    target = framework.removesuffix(".linen").removesuffix(".nnx")
    return convert_params({"scale": SCALE, "bias": BIAS}, source="jgn", target=target)


@EVERY_FRAMEWORK
def test_the_tables_epsilon_and_groups_are_the_frameworks_defaults(framework):
    arguments = inspect.signature(LAYERS[framework]().constructor.__init__).parameters
    (epsilon,) = arguments.keys() & {"epsilon", "eps"}
    (groups,) = arguments.keys() & {"num_groups", "groups"}
    assert arguments[epsilon].default == float(TABLE[framework]["epsilon"])
    given = {"given": inspect.Parameter.empty, "32": 32}
    assert arguments[groups].default == given[TABLE[framework]["groups"]]
    other_axis = re.findall("`(.*)`", TABLE[framework]["channels"])
    assert set(other_axis) == arguments.keys() & {"axis", "channel_axis", "data_format"} - (
        {"axis"} if framework == "haiku" else set()  # which are the axes to reduce
    )


@EVERY_FRAMEWORK
def test_the_tables_parameters_are_the_frameworks(framework):
    names = re.findall("`(.*?)`", TABLE[framework]["parameters"])
    assert LAYERS[framework]().initial(x_for(framework)).keys() == set(names)
    assert list(params_for(framework)) == names


@EVERY_FRAMEWORK
def test_the_frameworks_layer_computes_what_the_table_says(framework):
    theirs = LAYERS[framework]().apply(params_for(framework), x_for(framework))
    assert_equal_but_for_rounding(theirs, wanted_of(framework))


@EVERY_FRAMEWORK
def test_the_tables_output_dtype_is_the_frameworks(framework):
    layer, x = LAYERS[framework](), x_for(framework, "bfloat16")
    dtype, _, start = TABLE[framework]["output dtype"].partition(", ")
    wanted = {
        "x's": "bfloat16",
        "promoted with the parameters'": "float32",
        "the layer's": "float32",
    }
    assert layer.apply(params_for(framework), x).dtype == wanted[dtype]
    starts = {str(value.dtype).removeprefix("torch.") for value in layer.initial(x).values()}
    assert starts == {"bfloat16" if start == "which start in x's" else "float32"}


def moved(framework):
    """The layer of the table's last column, with parameters that came from the framework."""
    cell = TABLE[framework]["here"]
    names = {
        "jgn": jgn,
        "rngs": nnx.Rngs(0),
        "module": types.SimpleNamespace(
            num_groups=GROUPS,
            num_channels=CHANNELS,
            eps=float(TABLE[framework]["epsilon"]),
            affine=True,
            weight=SCALE,
            bias=BIAS,
        ),
    }
    exec("result = " + re.search("`(.*?)`", cell)[1], names)
    layer = names["result"]
    if framework == "torch":
        layer, variables = layer
        return lambda x: layer.apply(variables, x)
    source = framework.removesuffix(".linen").removesuffix(".nnx")
    params = convert_params(params_for(framework), source=source, target="jgn")
    if framework == "flax.nnx":
        nnx.update(layer, jax.tree.map(jnp.asarray, params))
        return layer
    return lambda x: layer.apply({"params": params}, x)


@EVERY_OTHER
def test_what_the_table_says_to_write_computes_the_frameworks_equation(framework):
    assert_equal_but_for_rounding(moved(framework)(x_for(framework)), wanted_of(framework))


@EVERY_OTHER
def test_what_the_table_says_to_write_computes_what_the_frameworks_layer_does(framework):
    theirs = LAYERS[framework]().apply(params_for(framework), x_for(framework))
    assert_equal_but_for_rounding(moved(framework)(x_for(framework)), theirs)


def test_equinoxs_line_takes_a_whole_batch_under_vmap_or_with_channel_axis_1():
    layer = LAYERS["equinox"]()
    batch = jnp.stack([x_for("equinox"), -x_for("equinox")])
    theirs = jax.vmap(lambda x: layer.apply(params_for("equinox"), x))(batch)
    assert "under `vmap`" in TABLE["equinox"]["here"]
    assert_equal_but_for_rounding(jax.vmap(moved("equinox"))(batch), theirs)
    ours = jgn.GroupNorm(GROUPS, channel_axis=1)
    params = {"scale": SCALE, "bias": BIAS}
    assert_equal_but_for_rounding(ours.apply({"params": params}, batch), theirs)


# What each section says beside the table


@pytest.mark.parametrize(
    ("ours", "theirs", "gone", "new"),
    [
        (
            jgn.GroupNorm,
            nn.GroupNorm,
            {"use_fast_variance", "force_float32_reductions"},
            {"channel_axis", "activation"},
        ),
        (
            jgn.nnx.GroupNorm,
            nnx.GroupNorm,
            {"use_fast_variance", "promote_dtype"},
            {"channel_axis", "activation"},
        ),
    ],
)
def test_flaxs_arguments_are_ours_but_for_those_named(ours, theirs, gone, new):
    ours, theirs = (inspect.signature(layer.__init__).parameters.keys() for layer in (ours, theirs))
    assert theirs - ours == gone
    assert ours - theirs == new
    assert all(f"`{name}`" in PAGE for name in gone)


def test_dtype_float32_keeps_flaxs_output_dtype():
    x = x_for("flax.linen", "bfloat16")
    layer = jgn.GroupNorm(GROUPS, epsilon=1e-6, dtype=jnp.float32)
    y = layer.apply({"params": params_for("flax.linen")}, x)
    theirs = LAYERS["flax.linen"]().apply(params_for("flax.linen"), x)
    assert y.dtype == theirs.dtype == "float32"
    assert_equal_but_for_rounding(y, theirs)


def test_haikus_moments_are_in_xs_own_dtype():
    """A mean of 300 is one of 300 or 302 in bfloat16, and stays in what should have none."""
    layer = LAYERS["haiku"]()
    x = jnp.asarray(random((1, 5, 6, CHANNELS), mean=301, deviation=4), "bfloat16")
    ones_and_zeros = {"scale": np.ones(CHANNELS), "bias": np.zeros(CHANNELS)}
    params = convert_params(ones_and_zeros, source="jgn", target="haiku")
    params = jax.tree.map(lambda values: jnp.asarray(values, "bfloat16"), params)
    means = [
        np.abs(np.asarray(y, np.float64).reshape(30, GROUPS, -1).mean((0, 2))).max()
        for y in (
            layer.apply(params, x),
            jgn.GroupNorm(GROUPS).apply({"params": ones_and_zeros}, x),
        )
    ]
    assert means[1] < 1e-3 < 1e-2 < means[0]


def test_parameters_of_haikus_channels_first_layers_are_reshaped():
    layer = of_haiku(slice(1, None), True, True, 1e-5, None, None, "channels_first")
    x = x_for("torch")
    assert {values.shape for values in layer.initial(x).values()} == {(CHANNELS, 1, 1)}
    params = {name: values.reshape(-1, 1, 1) for name, values in params_for("haiku").items()}
    ours = convert_params(params, source="haiku", target="jgn")
    ours = {name: values.reshape(CHANNELS) for name, values in ours.items()}
    y = jgn.GroupNorm(GROUPS, channel_axis=1).apply({"params": ours}, x)
    assert_equal_but_for_rounding(layer.apply(params, x), y)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"groups": -1}, {"num_groups": None, "group_size": 1}),
        ({"center": False}, {"use_bias": False}),
        ({"scale": False}, {"use_scale": False}),
        ({"axis": 1}, {"channel_axis": 1}),
    ],
)
def test_kerass_options_have_their_names_here(theirs, ours):
    layer = of_keras(**theirs)
    x = x_for("torch" if "axis" in theirs else "keras")
    params = {name: params_for("keras")[name] for name in layer.initial(x)}
    y = jgn.GroupNorm(**{"num_groups": GROUPS, "epsilon": 1e-3, **ours}).apply(
        {"params": convert_params(params, source="keras", target="jgn", where=lambda path: True)}, x
    )
    assert_equal_but_for_rounding(y, layer.apply(params, x))


def test_kerass_output_has_the_layers_dtype():
    layer, x = of_keras(dtype="bfloat16"), x_for("keras")
    assert layer.apply(params_for("keras"), x).dtype == "bfloat16"


SMALL_LAYERS = {
    "haiku": lambda hk, x: hk.transform(lambda x: hk.GroupNorm(2)(x)).apply(
        {"group_norm": {"scale": jnp.full(4, 2.0), "offset": jnp.ones(4)}}, None, x
    ),
    "equinox": lambda eqx, x: jax.vmap(eqx.nn.GroupNorm(2, 4))(x) * 2 + 1,
    "keras": lambda keras, x: keras.layers.GroupNormalization(
        2, gamma_initializer=keras.initializers.Constant(2), beta_initializer="ones"
    )(x),
}


@pytest.mark.parametrize("framework", SMALL_LAYERS)
def test_the_numbers_in_the_readme_are_the_frameworks_own(framework):
    module = pytest.importorskip(framework)
    names = names_after(framework)
    theirs = SMALL_LAYERS[framework](module, names.small)
    assert_equal_but_for_rounding(names.y, theirs)


# Whole networks


class Network(nn.Module):
    """What each framework's network is here."""

    epsilon: float

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), name="conv_0")(x)
        x = jgn.GroupNorm(2, epsilon=self.epsilon, activation=nn.relu, name="norm_0")(x)
        x = nn.Conv(12, (3, 3), name="conv_1")(x)
        x = jgn.GroupNorm(3, epsilon=self.epsilon, activation=nn.relu, name="norm_1")(x)
        return nn.Dense(5, name="head")(x.mean((1, 2)))


class Theirs(NamedTuple):
    """A framework's network, x channels-last."""

    params: Any
    logits_and_gradients: Callable[[Any, np.ndarray], tuple[Any, Any, Any]]  # in params and in x
    to_flax: Callable[[Any], Any]
    from_flax: Callable[[Any], Any]


LABELS = np.array([0, 3, 2, 4])


def logits_and_gradients(apply):
    def loss(params, x):
        logits = apply(params, x)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, LABELS)
        return losses.mean(), logits

    @jax.jit
    def both(params, x):
        (in_params, in_x), logits = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return logits, in_params, in_x

    return both


def renamed(tree, names):
    """Other layers than normalizations, whose parameters each framework calls as it likes."""
    return {
        layer: {names.get(name, name): value for name, value in params.items()}
        for layer, params in tree.items()
    }


def network_of_linen():
    class TheirNetwork(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.GroupNorm(2, name="norm_0")(nn.Conv(8, (3, 3), name="conv_0")(x)))
            x = nn.relu(nn.GroupNorm(3, name="norm_1")(nn.Conv(12, (3, 3), name="conv_1")(x)))
            return nn.Dense(5, name="head")(x.mean((1, 2)))

    network = TheirNetwork()
    params = jax.jit(network.init)(jax.random.key(0), jnp.ones((1, 9, 7, 3)))["params"]
    apply = lambda params, x: network.apply({"params": params}, x)  # noqa: E731
    return Theirs(params, logits_and_gradients(apply), lambda tree: tree, lambda tree: tree)


class NetworkOfNnx(nnx.Module):
    def __init__(self, group_norm, rngs):
        self.conv_0 = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm_0 = group_norm(8, 2, rngs=rngs)
        self.conv_1 = nnx.Conv(8, 12, (3, 3), rngs=rngs)
        self.norm_1 = group_norm(12, 3, rngs=rngs)
        self.head = nnx.Linear(12, 5, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm_0(self.conv_0(x)))
        x = nnx.relu(self.norm_1(self.conv_1(x)))
        return self.head(x.mean((1, 2)))


def network_of_nnx(group_norm=nnx.GroupNorm):
    def apply(params, x):
        network = NetworkOfNnx(group_norm, nnx.Rngs(0))
        nnx.update(network, params)
        return network(x)

    params = nnx.to_pure_dict(nnx.state(NetworkOfNnx(group_norm, nnx.Rngs(0))))
    return Theirs(params, logits_and_gradients(apply), lambda tree: tree, lambda tree: tree)


def network_of_torch():
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential()
    for name, layer in {
        "conv_0": torch.nn.Conv2d(3, 8, 3, padding=1),
        "norm_0": torch.nn.GroupNorm(2, 8),
        "relu_0": torch.nn.ReLU(),
        "conv_1": torch.nn.Conv2d(8, 12, 3, padding=1),
        "norm_1": torch.nn.GroupNorm(3, 12),
        "relu_1": torch.nn.ReLU(),
        "pool": torch.nn.AdaptiveAvgPool2d(1),
        "flat": torch.nn.Flatten(),
        "head": torch.nn.Linear(12, 5),
    }.items():
        network.add_module(name, layer)

    def logits_and_gradients(state, x):
        network.load_state_dict(state)
        network.zero_grad()
        x = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()
        logits = network(x)
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(LABELS)).backward()
        in_state = {name: parameter.grad for name, parameter in network.named_parameters()}
        return logits.detach().numpy(), in_state, np.moveaxis(x.grad.numpy(), 1, -1)

    typed = names_after("torch")
    return Theirs(
        dict(network.state_dict()),
        logits_and_gradients,
        typed.flax_params,
        lambda params: typed.torch_state(params, torch.from_dlpack),
    )


def network_of_haiku():
    hk = pytest.importorskip("haiku")

    def forward(x):
        x = jax.nn.relu(hk.GroupNorm(2, name="norm_0")(hk.Conv2D(8, 3, name="conv_0")(x)))
        x = jax.nn.relu(hk.GroupNorm(3, name="norm_1")(hk.Conv2D(12, 3, name="conv_1")(x)))
        return hk.Linear(5, name="head")(x.mean((1, 2)))

    network = hk.without_apply_rng(hk.transform(forward))
    params = jax.jit(network.init)(jax.random.key(0), jnp.ones((1, 9, 7, 3)))

    def to_flax(params):
        params = convert_params(params, source="haiku", target="flax")
        return renamed(params, {"w": "kernel", "b": "bias"})

    def from_flax(params):
        params = convert_params(params, source="flax", target="haiku")
        return renamed(params, {"kernel": "w", "bias": "b"})

    return Theirs(params, logits_and_gradients(network.apply), to_flax, from_flax)


def network_of_equinox():
    eqx = pytest.importorskip("equinox")
    keys = jax.random.split(jax.random.key(0), 3)

    class TheirNetwork(eqx.Module):
        conv_0: eqx.nn.Conv2d
        norm_0: eqx.nn.GroupNorm
        conv_1: eqx.nn.Conv2d
        norm_1: eqx.nn.GroupNorm
        head: eqx.nn.Linear

        def __call__(self, x):
            x = jax.nn.relu(self.norm_0(self.conv_0(x)))
            x = jax.nn.relu(self.norm_1(self.conv_1(x)))
            return self.head(x.mean((1, 2)))

    module = TheirNetwork(
        eqx.nn.Conv2d(3, 8, 3, padding=1, key=keys[0]),
        eqx.nn.GroupNorm(2, 8),
        eqx.nn.Conv2d(8, 12, 3, padding=1, key=keys[1]),
        eqx.nn.GroupNorm(3, 12),
        eqx.nn.Linear(12, 5, key=keys[2]),
    )
    typed = names_after("equinox")

    def with_biases(tree, shape):
        """A convolution's have the axes of its output in equinox."""
        return {
            name: value.reshape(shape) if re.fullmatch(r"conv_\d\.bias", name) else value
            for name, value in tree.items()
        }

    def to_flax(module):
        return typed.flax_params(with_biases(typed.named_leaves(module), -1))

    def from_flax(params):
        back = with_biases(typed.torch_state(params, jnp.asarray), (-1, 1, 1))
        return typed.with_leaves(module, back)

    apply = lambda module, x: jax.vmap(module)(jnp.moveaxis(x, -1, 1))  # noqa: E731
    return Theirs(module, logits_and_gradients(apply), to_flax, from_flax)


def network_of_keras():
    keras = pytest.importorskip("keras")
    layers = keras.layers
    network = keras.Sequential(
        [
            layers.Input((9, 7, 3)),
            layers.Conv2D(8, 3, padding="same", name="conv_0"),
            layers.GroupNormalization(2, name="norm_0"),
            layers.ReLU(),
            layers.Conv2D(12, 3, padding="same", name="conv_1"),
            layers.GroupNormalization(3, name="norm_1"),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(5, name="head"),
        ],
        name="network",
    )
    variables = {variable.path: np.asarray(variable.value) for variable in network.variables}

    paths = list(variables)  # in the order of the network, which jax does not keep

    def apply(variables, x):
        return network.stateless_call([variables[path] for path in paths], [], x)[0]

    def to_flax(variables):
        params = convert_params(variables, source="keras", target="flax")
        return unflatten_dict(params, sep="/")["network"]

    def from_flax(params):
        flat = flatten_dict({"network": params}, sep="/")
        back = convert_params(flat, source="flax", target="keras")
        return {path: back[path] for path in paths}

    return Theirs(variables, logits_and_gradients(apply), to_flax, from_flax)


NETWORKS = {
    "flax.linen": network_of_linen,
    "flax.nnx": network_of_nnx,
    "torch": network_of_torch,
    "haiku": network_of_haiku,
    "equinox": network_of_equinox,
    "keras": network_of_keras,
}


def random_like(params):
    leaves, structure = jax.tree.flatten(params)
    return structure.unflatten(
        [random(leaf.shape, seed, mean=0.1, deviation=0.4) for seed, leaf in enumerate(leaves)]
    )


def assert_close(ours, theirs):
    """In logits, and in their gradients, which sum some hundred terms of either sign."""
    chex.assert_trees_all_close(ours[0], theirs[0], rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(ours[1:], theirs[1:], rtol=1e-4, atol=1e-6)


@functools.cache
def ours_for(framework):
    """What it moves to here."""
    epsilon = float(TABLE[framework]["epsilon"])
    if framework == "flax.nnx":
        norm = functools.partial(jgn.nnx.GroupNorm, epsilon=epsilon)
        return network_of_nnx(norm).logits_and_gradients
    network = Network(epsilon)
    return logits_and_gradients(lambda params, x: network.apply({"params": params}, x))


@EVERY_OTHER
def test_a_whole_network_moves_here_and_back(framework):
    """The same bits there and back, the same outputs and the same gradients on both sides."""
    theirs = NETWORKS[framework]()
    moved_here = theirs.to_flax(theirs.params)
    chex.assert_trees_all_equal(theirs.from_flax(moved_here), theirs.params)
    params, x = random_like(moved_here), random((4, 9, 7, 3))
    moved_back = theirs.from_flax(params)
    chex.assert_trees_all_equal(theirs.to_flax(moved_back), params)

    logits, in_params, in_x = theirs.logits_and_gradients(moved_back, x)
    assert_close(ours_for(framework)(params, x), (logits, theirs.to_flax(in_params), in_x))


# Every pattern of bits: infinities, zeros of both signs, denormals, what is not a number.


def patterns(shape, dtype, seed=0):
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), dtype).reshape(shape)


EITHER_DTYPE = pytest.mark.parametrize(
    "dtype", [jnp.dtype("bfloat16"), jnp.dtype("float32")], ids=str
)


@EITHER_DTYPE
def test_a_state_of_torchs_keeps_every_bit(dtype):
    torch = pytest.importorskip("torch")
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.GroupNorm(2, 8))
    network.to(getattr(torch, dtype.name))
    typed = names_after("torch")
    before = {name: patterns(value.shape, dtype) for name, value in network.state_dict().items()}
    network.load_state_dict(
        {
            name: torch.frombuffer(
                bytearray(values.tobytes()), dtype=getattr(torch, dtype.name)
            ).reshape(values.shape)
            for name, values in before.items()
        }
    )
    params = typed.flax_params(network.state_dict())
    assert_same_bits(params["1"]["scale"], before["1.weight"])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    network.load_state_dict(typed.torch_state(params, torch.from_dlpack))
    after = {
        name: tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in network.state_dict().items()
    }
    assert after == {name: values.tobytes() for name, values in before.items()}


@EITHER_DTYPE
def test_a_module_of_equinoxs_keeps_every_bit(dtype):
    eqx = pytest.importorskip("equinox")
    typed = names_after("equinox")
    module = {"norm": eqx.nn.GroupNorm(2, 8)}
    before = {
        name: jnp.asarray(patterns((8,), dtype, seed))
        for seed, name in enumerate(typed.named_leaves(module))
    }
    ours = convert_params(
        typed.named_leaves(typed.with_leaves(module, before)), source="equinox", target="jgn"
    )
    assert_same_bits(ours["norm.scale"], before["norm.weight"])
    back = convert_params(ours, source="jgn", target="equinox")
    after = typed.named_leaves(typed.with_leaves(module, back))
    jax.tree.map(assert_same_bits, after, before)


@EITHER_DTYPE
def test_variables_of_kerass_keep_every_bit(dtype):
    keras = pytest.importorskip("keras")
    model = keras.Sequential(
        [keras.layers.Input((8,)), keras.layers.GroupNormalization(2, dtype=dtype.name)]
    )
    before = {
        variable.path: patterns(variable.shape, dtype, seed)
        for seed, variable in enumerate(model.variables)
    }
    for variable in model.variables:
        variable.assign(before[variable.path])
    variables = {variable.path: np.asarray(variable.value) for variable in model.variables}
    ours = convert_params(variables, source="keras", target="jgn")
    assert {name.rpartition("/")[2] for name in ours} == {"scale", "bias"}
    back = convert_params(ours, source="jgn", target="keras")
    for variable in model.variables:
        variable.assign(jnp.zeros_like(variable.value))
        variable.assign(back[variable.path])
        assert_same_bits(variable.value, before[variable.path])


@EITHER_DTYPE
def test_params_of_haikus_keep_every_bit(dtype):
    hk = pytest.importorskip("haiku")
    network = hk.without_apply_rng(hk.transform(lambda x: hk.GroupNorm(2)(x)))
    params = network.init(None, jnp.ones((2, 3, 8), dtype))
    before = jax.tree.map(lambda leaf: patterns(leaf.shape, leaf.dtype), params)
    ours = convert_params(before, source="haiku", target="jgn")
    assert_same_bits(ours["group_norm"]["bias"], before["group_norm"]["offset"])
    back = convert_params(ours, source="jgn", target="haiku")
    jax.tree.map(assert_same_bits, back, before)
    assert type(back) is type(params)
    network.apply(back, jnp.ones((2, 3, 8), dtype))
