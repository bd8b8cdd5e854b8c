"""Bad input is answered at the door: the rule, what came, and the way out."""

import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jgn

X = np.ones((2, 3, 12), np.float32)
TABLE = "(num_groups × group_size: 1 × 12, 2 × 6, 3 × 4, 4 × 3, 6 × 2, 12 × 1)"
CHANNELS_OF_X = "; the channels are axis 2 of x, shape (2, 3, 12): see channel_axis"
IMMENSE = jax.ShapeDtypeStruct((1 << 30, 1 << 20, 12), "float32")


class Unhashable:
    """As a module of flax.linen is inside another: it has a hash, which raises TypeError."""

    def __hash__(self):
        return hash([])

    def __call__(self, y):
        return y

    def __repr__(self):
        return "Unhashable()"


# x, arguments of group_norm, the error, and its text in full
FUNCTION = [
    (
        X,
        {"num_groups": 5},
        ValueError,
        "num_groups must divide the channels: got num_groups=5 for 12 channels; "
        f"the nearest that do are 4 and 6 {TABLE}{CHANNELS_OF_X}.",
    ),
    (
        X,
        {"num_groups": 32},
        ValueError,
        "num_groups must divide the channels: got num_groups=32 for 12 channels; "
        f"the nearest that do are 12 {TABLE}{CHANNELS_OF_X}.",
    ),
    # As if it were a weight.
    (
        X,
        {"num_groups": np.ones(512)},
        TypeError,
        "num_groups must be an integer known when the call is traced: "
        "got array([1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., 1., ….",
    ),
    *(
        (x, {}, TypeError, f"x must be an array of numbers: got {shown}.")
        for x, shown in (
            (np.zeros(4, ">f4"), "array([0., 0., 0., 0.], dtype='>f4')"),
            (
                np.zeros((9, 8), ">f4"),
                "array([[0., 0., 0., 0., 0., 0., 0., 0.], [0., 0., 0., 0., 0… of dtype >f4",
            ),
            (
                np.ma.masked_array(np.ones(2), [False, True]),
                "masked_array(data=[1.0, --], mask=[False, True], fill_value… of dtype float64",
            ),
        )
    ),
    (X, {"num_groups": 0}, ValueError, "num_groups must be 1 or more: got 0."),
    (X, {"num_groups": -2}, ValueError, "num_groups must be 1 or more: got -2."),
    *(
        (
            X,
            {"num_groups": bad},
            TypeError,
            f"num_groups must be an integer known when the call is traced: got {bad!r}.",
        )
        for bad in (4.0, "4", None, True)
    ),
    (
        X,
        {"channel_axis": 3},
        ValueError,
        "channel_axis must lie in [-3, 3) for an x of rank 3: got 3.",
    ),
    (
        X,
        {"channel_axis": -4},
        ValueError,
        "channel_axis must lie in [-3, 3) for an x of rank 3: got -4.",
    ),
    (X, {"channel_axis": 1.0}, TypeError, "channel_axis must be an integer: got 1.0."),
    (
        X,
        {"reduction_axes": (1, 2, 3)},
        ValueError,
        "reduction_axes must lie in [-3, 3) for an x of rank 3: got 3.",
    ),
    (
        X,
        {"reduction_axes": (2, -1)},
        ValueError,
        "reduction_axes must not repeat an axis: got (2, -1) for an x of rank 3.",
    ),
    (
        X,
        {"reduction_axes": (0, 1)},
        ValueError,
        "reduction_axes must contain the channel axis: "
        "got reduction_axes=(0, 1) with channel_axis=-1.",
    ),
    (
        X,
        {"reduction_axes": ()},
        ValueError,
        "reduction_axes must contain the channel axis: got reduction_axes=() with channel_axis=-1.",
    ),
    (X, {"channel_axis": True}, TypeError, "channel_axis must be an integer: got True."),
    *(
        (
            X,
            {"reduction_axes": axes},
            TypeError,
            f"reduction_axes must be one or more integers: got {bad!r}.",
        )
        for axes, bad in (
            ((1.0, 2), 1.0),
            ((True, 2), True),
            (np.array([1.0, 2.0]), np.float64(1.0)),
            (np.array(1.0), np.array(1.0)),
            ("12", "12"),
        )
    ),
    (
        np.float32(1),
        {},
        ValueError,
        "x must have a channel axis: got a scalar; its rank must be 1 or more.",
    ),
    *(
        (
            X,
            {name: np.ones(shape, np.float32)},
            ValueError,
            f"{name} must have one value a channel, shape (12,) or (2, 12), "
            f"for an x of shape (2, 3, 12): got shape {shape}.",
        )
        for name in ("scale", "bias")
        for shape in ((4,), (3, 12), (1, 12), (12, 1), (), (2, 3, 12))
    ),
    (
        np.ones(12, np.float32),
        {"scale": np.ones(3, np.float32), "channel_axis": 0},
        ValueError,
        "scale must have one value a channel, shape (12,), for an x of shape (12,): "
        "got shape (3,).",
    ),
    (
        X,
        {"bias": np.ones(12, np.complex64)},
        TypeError,
        "bias must be real for a real x: got complex64 for float32.",
    ),
    *(
        (
            X,
            {"mask": np.ones(shape, bool)},
            ValueError,
            f"mask must be broadcastable to x: got shape {shape} for an x of shape (2, 3, 12); "
            "give it x's rank, with size 1 where it does not vary.",
        )
        for shape in ((2, 3), (2,), (4, 3, 12), (1, 2, 3, 12), (0, 3, 12))
    ),
    (
        X,
        {"mask": np.ones((2, 3, 1), np.float32)},
        TypeError,
        "mask must be boolean: got float32; write mask != 0.",
    ),
    (X, {"mask": "all"}, TypeError, "mask must be an array of booleans: got 'all'."),
    (
        np.array(["a", "b"]),
        {"channel_axis": 0, "num_groups": 1},
        TypeError,
        "x must be an array of numbers: got array(['a', 'b'], dtype='<U1').",
    ),
    ("text", {}, TypeError, "x must be an array of numbers: got 'text'."),
    (None, {}, TypeError, "x must be an array of numbers: got None."),
    (
        np.array([None, 1]),
        {"channel_axis": 0, "num_groups": 1},
        TypeError,
        "x must be an array of numbers: got array([None, 1], dtype=object).",
    ),
    *(
        (
            np.zeros((2, 12), narrow),
            {},
            TypeError,
            "x must be float16, bfloat16, float32, float64, complex64, complex128, integer or "
            f"boolean: got {narrow}.",
        )
        for narrow in ("float8_e4m3fn", "int2")
    ),
    (X, {"scale": "one"}, TypeError, "scale must be an array of numbers: got 'one'."),
    (X, {"epsilon": -1e-5}, ValueError, "epsilon must be finite and not negative: got -1e-05."),
    *(
        (X, {"epsilon": bad}, ValueError, f"epsilon must be finite and not negative: got {bad}.")
        for bad in (np.nan, np.inf)
    ),
    *(
        (
            X,
            {"epsilon": bad},
            TypeError,
            f"epsilon must be a number known when the call is traced: got {bad!r}.",
        )
        for bad in (b"4", bytearray(b"4"), True, np.True_, jnp.array(True))
    ),
    (
        X,
        {"epsilon": "small"},
        TypeError,
        "epsilon must be a number known when the call is traced: got 'small'.",
    ),
    (
        X,
        {"mask": np.ones((2, 3, 1), jnp.float8_e5m2)},
        TypeError,
        "mask must be boolean: got float8_e5m2; write mask != 0.",
    ),
    (X, {"activation": "silu"}, TypeError, "activation must be callable: got 'silu'."),
    (
        X,
        {"activation": Unhashable()},
        TypeError,
        "activation must be hashable, apart from its arrays, as it is part of jax.jit's cache "
        "key: got Unhashable; call it on the result instead.",
    ),
    (X, {"dtype": "int32"}, TypeError, "dtype must be floating or complex: got int32."),
    (
        X.astype(np.complex64),
        {"dtype": "float32"},
        TypeError,
        "dtype must be complex for a complex x: got float32.",
    ),
    (
        X,
        {"axis_name": "a", "axis_index_groups": 3},
        TypeError,
        "axis_index_groups must be a sequence of groups of indices: got 3.",
    ),
    (
        X,
        {"axis_name": "a", "axis_index_groups": ((0, 1.5),)},
        TypeError,
        "axis_index_groups must be a sequence of groups of indices: got ((0, 1.5),).",
    ),
    *(
        (
            X,
            {"axis_name": "a", "axis_index_groups": groups},
            ValueError,
            f"axis_index_groups must be one or more groups of one or more indices: got {groups}.",
        )
        for groups in ((), ((),), ((0,), ()))
    ),
    (
        X,
        {"axis_name": (set(),)},
        TypeError,
        "axis_name must be one or more names: got (set(),).",
    ),
    (
        X,
        {"activation": lambda y: y.sum()},
        ValueError,
        "activation must be elementwise: got shape () for an x of shape (2, 3, 12).",
    ),
    (
        X,
        {"activation": lambda y: 1.0},
        ValueError,
        "activation must be elementwise: got 1.0 for an x of shape (2, 3, 12).",
    ),
    (
        X,
        {"activation": lambda y: None},
        ValueError,
        "activation must be elementwise: got None for an x of shape (2, 3, 12).",
    ),
    (
        X,
        {"activation": lambda y: jax.lax.complex(y, y)},
        ValueError,
        "activation must give real numbers for an output of float32: got complex64.",
    ),
    (
        X,
        {"axis_index_groups": ((0, 1),)},
        ValueError,
        "axis_index_groups needs axis_name: got ((0, 1),) with axis_name=None.",
    ),
]


def whole(text):
    # Below the message itself, JAX may note that it left frames out of the traceback.
    return f"^{re.escape(text)}(\n|$)"


@pytest.mark.parametrize(("x", "arguments", "error", "text"), FUNCTION)
def test_the_function_answers(x, arguments, error, text):
    with pytest.raises(error, match=whole(text)):
        jgn.group_norm(x, **{"num_groups": 4, **arguments})


LAYER = [
    *(
        (
            {"num_groups": num_groups, "group_size": group_size},
            ValueError,
            "exactly one of num_groups and group_size must be given: "
            f"got num_groups={num_groups} and group_size={group_size}; "
            f"to give the size, write num_groups=None, group_size=... instead{CHANNELS_OF_X}.",
        )
        for num_groups, group_size in ((4, 3), (None, None))
    ),
    (
        {"num_groups": None, "group_size": 5},
        ValueError,
        "group_size must divide the channels: got group_size=5 for 12 channels; "
        f"the nearest that do are 4 and 6 {TABLE}{CHANNELS_OF_X}.",
    ),
    (
        {"num_groups": None, "group_size": 0},
        ValueError,
        "group_size must be 1 or more: got 0.",
    ),
    (
        {"num_groups": None, "group_size": 3.0},
        TypeError,
        "group_size must be an integer known when the call is traced: got 3.0.",
    ),
    (
        {},
        ValueError,
        "num_groups must divide the channels: got num_groups=32 for 12 channels; "
        f"the nearest that do are 12 {TABLE}{CHANNELS_OF_X}.",
    ),
]


@pytest.mark.parametrize(("configuration", "error", "text"), LAYER)
def test_the_layer_answers_about_its_groups(configuration, error, text):
    layer = jgn.GroupNorm(**configuration)
    with pytest.raises(error, match=whole(text)):
        layer.init(jax.random.key(0), X)


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_the_layer_takes_a_scale_or_bias_from_one_place(name):
    layer = jgn.GroupNorm(4)
    text = (
        f"{name} must come from the layer or from the call, not both: got {name} in the call of a "
        f"layer with use_{name}=True; write GroupNorm(..., use_{name}=False)."
    )
    with pytest.raises(ValueError, match=whole(text)):
        layer.init(jax.random.key(0), X, **{name: np.ones(12, np.float32)})


CALL_TIME = ("scale", "bias", "mask")


# The layer takes num_groups=None to mean that group_size is given.
@pytest.mark.parametrize(
    ("x", "arguments", "error", "text"),
    [row for row in FUNCTION if row[1].get("num_groups", 4) is not None],
)
def test_the_layer_passes_the_answers_of_the_function_on(x, arguments, error, text):
    call = {name: value for name, value in arguments.items() if name in CALL_TIME}
    configuration = {name: value for name, value in arguments.items() if name not in CALL_TIME}
    layer = jgn.GroupNorm(
        **{"num_groups": 4, "use_scale": False, "use_bias": False} | configuration
    )
    with pytest.raises(error, match=whole(text)):
        layer.apply({}, x, **call)


@pytest.mark.parametrize(
    "arguments",
    [{"num_groups": 5}, {"epsilon": -1}, {"reduction_axes": 0}, {"scale": np.ones(3, np.float32)}],
    ids=str,
)
def test_an_x_that_no_memory_holds_is_refused_while_it_is_traced(arguments):
    with pytest.raises(ValueError, match="must"):
        jax.eval_shape(lambda x: jgn.group_norm(x, **{"num_groups": 4, **arguments}), IMMENSE)


def test_a_billion_channels_are_refused_at_once():
    text = (
        "num_groups must divide the channels: got num_groups=3 for 1073741824 channels; the nearest"
    )
    start = time.monotonic()
    with pytest.raises(ValueError, match=f"^{text} that do are 2 and 4 "):
        jax.eval_shape(
            lambda x: jgn.group_norm(x, 3), jax.ShapeDtypeStruct((1, 1 << 30), "float32")
        )
    assert time.monotonic() - start < 5, "counting to a billion takes a minute"


@pytest.mark.parametrize("name", ["num_groups", "epsilon"])
def test_a_traced_number_is_told_that_it_must_not_be(name):
    def normalized(number):
        return jgn.group_norm(X, **{"num_groups": 4, name: number})

    with pytest.raises(TypeError, match=f"^{name} must be .* known when the call is traced: got "):
        jax.jit(normalized)(2)


@pytest.mark.parametrize("size", ["c", "4*c"])
@pytest.mark.parametrize("groups", [{"num_groups": 4}, {"num_groups": None, "group_size": 4}])
def test_a_symbolic_number_of_channels_is_refused(size, groups):
    x = jax.ShapeDtypeStruct(export.symbolic_shape(f"n, 8, {size}"), "float32")
    rule = f"the number of channels must be known when the call is traced: got {size}; other "
    with pytest.raises(ValueError, match=re.escape(rule)):
        export.export(jax.jit(jgn.GroupNorm(**groups).apply))({}, x)


def test_an_unbound_axis_name_is_named():
    with pytest.raises(NameError, match="unbound axis name: shards"):
        jgn.group_norm(X, 4, axis_name="shards")
