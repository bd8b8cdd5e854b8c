"""No bad call returns, computes, or raises anything but what is documented, whatever its x.

Each call breaks one rule of a call that the documentation allows.
"""

import collections
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import batch_shape
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from test_properties import calls

import jgn
import jgn.nnx

CALL_TIME = ("mask", "scale", "bias")


def through_function(x, arguments):
    return jgn.group_norm(x, **arguments)


def split(arguments):
    """What the layers take when they are made, and when they are called."""
    made = {name: value for name, value in arguments.items() if name not in CALL_TIME}
    called = {name: value for name, value in arguments.items() if name in CALL_TIME}
    return {"use_scale": False, "use_bias": False, **made}, called


def through_linen(x, arguments):
    made, called = split(arguments)
    return jgn.GroupNorm(**made).apply({}, x, **called)


def through_nnx(x, arguments, channels):
    made, called = split(arguments)
    made = {"num_features": channels, "scale_init": ones, "bias_init": ones, **made}
    return jgn.nnx.GroupNorm(**made, rngs=NO_KEYS)(x, **called)


# To make this layer is to compute its parameters, unless they are NumPy's.
NO_KEYS = types.SimpleNamespace(params=lambda: None)


def ones(_, shape, dtype):
    return np.ones(shape, dtype)


NO_NUMBER = ("4", None, b"4", (4,), 1j, object())


def bad_groups(generator, x, options):
    channels = x.shape[options["channel_axis"]]
    undivided = [n for n in generator.sample(range(2, 10**6), 6) if channels % n]
    undivided += [n for n in range(2, channels) if channels % n][:6]
    for bad in (*undivided, channels + 1, 2 * channels, 10**30):
        rule = f"num_groups must divide the channels: got num_groups={bad} for {channels} channels;"
        yield {"num_groups": bad}, ValueError, rule
    for bad in (0, -1, -channels, -generator.randrange(1, 10**12)):
        rule = f"num_groups must be 1 or more: got {bad}."
        yield {"num_groups": bad}, ValueError, rule
    for bad in (*NO_NUMBER, generator.uniform(1, channels), float(channels), True, np.True_):
        rule = f"num_groups must be an integer known when the call is traced: got {bad!r}."
        yield {"num_groups": bad}, TypeError, rule


def bad_axes(generator, x, options):
    rank, channel = x.ndim, options["channel_axis"] % x.ndim
    where = f"must lie in [{-rank}, {rank}) for an x of rank {rank}: got"
    for bad in (rank, -rank - 1, rank + generator.randrange(10**9), -(10**20)):
        yield {"channel_axis": bad}, ValueError, f"channel_axis {where} {bad}."
        axes = tuple(generator.sample([channel, bad], 2))
        yield {"reduction_axes": axes}, ValueError, f"reduction_axes {where} {bad}."
    for bad in (*NO_NUMBER, generator.random(), 1.0, True):
        yield {"channel_axis": bad}, TypeError, f"channel_axis must be an integer: got {bad!r}."
        rule = f"reduction_axes must be one or more integers: got {bad!r}."
        yield {"reduction_axes": (bad, channel)}, TypeError, rule
    again = (channel, generator.choice([channel, channel - rank]))
    rule = f"reduction_axes must not repeat an axis: got {again} for an x of rank {rank}."
    yield {"reduction_axes": again}, ValueError, rule
    others = [axis for axis in range(rank) if axis != channel]
    for bad in {(), tuple(generator.sample(others, generator.randrange(rank)))}:
        rule = f"reduction_axes must contain the channel axis: got reduction_axes={bad} with"
        yield {"reduction_axes": bad}, ValueError, rule


def bad_parameters(generator, x, options):
    channels = x.shape[options["channel_axis"]]
    where = {name: options.get(name) for name in ("channel_axis", "reduction_axes")}
    right = ((channels,), (*batch_shape(x.shape, **where), channels))
    shapes = [(), (1,), (channels + 1,), (channels, 1), (1, 1, channels), (2 * channels,)]
    shapes += [(generator.randrange(9), channels), (generator.randrange(3),) * 7]
    for name in ("scale", "bias"):
        for shape in shapes:
            if shape not in right:
                rule = f"{name} must have one value a channel, shape ({channels},)"
                yield {name: np.ones(shape, "float32")}, ValueError, rule
        if not jnp.issubdtype(x.dtype, jnp.complexfloating):
            rule = f"{name} must be real for a real x: got complex64 for {x.dtype}."
            yield {name: np.ones(channels, "complex64")}, TypeError, rule
        for bad in ("one", object(), [[1], [2, 3]]):
            rule = f"{name} must be an array of numbers: got {bad!r:.60}."
            yield {name: bad}, TypeError, rule


def bad_masks(generator, x, _):
    axis = generator.randrange(x.ndim)
    longer = list(x.shape)
    longer[axis] = max(2, longer[axis] + 1)
    for shape in (longer, longer[axis:], [1, *x.shape], [1] * (x.ndim + 1)):
        rule = f"mask must be broadcastable to x: got shape {tuple(shape)} for an x of shape"
        yield {"mask": np.broadcast_to(True, shape)}, ValueError, rule
    for kind in ("float32", "int8", "complex64", "uint16"):
        rule = f"mask must be boolean: got {kind}; write mask != 0."
        yield {"mask": np.ones((1,) * x.ndim, kind)}, TypeError, rule
    for bad in ("all", object()):
        yield {"mask": bad}, TypeError, f"mask must be an array of booleans: got {bad!r:.60}."


def bad_options(generator, x, _):
    for bad in (math.nan, math.inf, -math.inf, -1e-300, -generator.uniform(0.1, 9), np.float32(-1)):
        rule = f"epsilon must be finite and not negative: got {float(bad)}."
        yield {"epsilon": bad}, ValueError, rule
    yield {"epsilon": 10**400}, ValueError, "epsilon must be finite and not negative: got inf."
    for bad in (*NO_NUMBER, False, np.False_):
        rule = f"epsilon must be a number known when the call is traced: got {bad!r}."
        yield {"epsilon": bad}, TypeError, rule
    for bad in ("int32", "bool", "uint8", "float8_e5m2"):
        yield {"dtype": bad}, TypeError, f"dtype must be floating or complex: got {bad}."
    for bad in ("nonsense", generator.randrange(9)):
        yield {"dtype": bad}, TypeError, f"dtype must be floating or complex: got {bad!r}."
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        for bad in ("float32", "bfloat16"):
            rule = f"dtype must be complex for a complex x: got {bad}."
            yield {"dtype": bad}, TypeError, rule
    for bad in ("silu", generator.random(), ()):
        yield {"activation": bad}, TypeError, f"activation must be callable: got {bad!r}."
    for bad in (3, 1.5, (set(),)):
        yield {"axis_name": bad}, TypeError, f"axis_name must be one or more names: got {bad!r}."
    for bad in (3, ((0, 0.5),), (("a",),)):
        rule = f"axis_index_groups must be a sequence of groups of indices: got {bad}."
        yield {"axis_name": "a", "axis_index_groups": bad}, TypeError, rule
    for bad in ((), ((),), ((0,), ())):
        rule = f"axis_index_groups must be one or more groups of one or more indices: got {bad}."
        yield {"axis_name": "a", "axis_index_groups": bad}, ValueError, rule
    rule = "axis_index_groups needs axis_name: got ((0,),) with axis_name=None."
    yield {"axis_index_groups": ((0,),)}, ValueError, rule


def bad_inputs(generator, *_):
    for bad in ("text", None, object(), 2**100, [[1], [2, 3]]):
        yield {"x": bad}, TypeError, f"x must be an array of numbers: got {bad!r:.60}."
    for bad in (np.array(["a"]), np.array([None, 1])):
        yield {"x": bad}, TypeError, "x must be an array of numbers: got array("
    narrow = generator.choice(["float8_e4m3fn", "float8_e5m2", "int2", "uint2"])
    yield {"x": np.zeros((2, 3), narrow)}, TypeError, "x must be float16, bfloat16, float32, "
    for bad in (1.5, np.float32(1), np.ones(())):
        yield {"x": bad}, ValueError, "x must have a channel axis: got a scalar;"


def bad_calls(generator, x, options):
    """What breaks a call, the error, and the beginning of its text."""
    for kind in (bad_groups, bad_axes, bad_parameters, bad_masks, bad_options, bad_inputs):
        yield from kind(generator, x, options)


def bad_layers(channels):
    """The same for what only the layers know."""
    text = "exactly one of num_groups and group_size must be given: got num_groups="
    yield {"num_groups": None}, ValueError, f"{text}None and group_size=None;"
    yield {"num_groups": 1, "group_size": 1}, ValueError, f"{text}1 and group_size=1;"
    for bad, error, rule in (
        (channels + 1, ValueError, f"divide the channels: got group_size={channels + 1} for"),
        (0, ValueError, "be 1 or more: got 0."),
        (1.0, TypeError, "be an integer known when the call is traced: got 1.0."),
    ):
        yield {"num_groups": None, "group_size": bad}, error, f"group_size must {rule}"
    for name in ("scale", "bias"):
        given_too = {f"use_{name}": True, name: np.ones(channels, "float32")}
        yield given_too, ValueError, f"{name} must come from the layer or from the call, not both:"


def bad_features(channels):
    """The same for what only the layer of nnx knows."""
    for bad in (channels + 1, 2 * channels):
        rule = f"x must have num_features channels: got {channels} on axis"
        yield {"num_features": bad, "num_groups": 1}, ValueError, rule
    yield {"num_features": -1}, ValueError, "num_features must be 1 or more: got -1."
    for bad in (*NO_NUMBER, float(channels)):
        rule = f"num_features must be an integer known when the call is traced: got {bad!r}."
        yield {"num_features": bad}, TypeError, rule


def test_ten_thousand_bad_calls_are_answered_before_anything_is_computed():
    tried = collections.Counter()

    @settings(max_examples=50, phases=[Phase.explicit, Phase.generate])
    @given(calls(), st.randoms(use_true_random=False), st.booleans())
    def bad_calls_are_answered(call, generator, traced):
        x, num_groups, options = call
        good = {"num_groups": num_groups, **options}
        channels = x.shape[options["channel_axis"]]
        broken = list(bad_calls(generator, x, options))
        without = {name: good[name] for name in good if name not in ("scale", "bias")}
        of_layers = [bad for bad in broken if bad[0].get("num_groups", 1) is not None]
        in_nnx = functools.partial(through_nnx, channels=channels)
        series = (
            ("function", through_function, good, broken),
            ("linen", through_linen, good, of_layers),
            ("linen", through_linen, without, bad_layers(channels)),
            ("nnx", in_nnx, good, of_layers),
            ("nnx", in_nnx, without, [*bad_layers(channels), *bad_features(channels)]),
        )

        def everything_bad(argument):
            for name, made_by, allowed, those in series:
                for breach, error, text in those:
                    arguments = {"x": argument if traced else x, **allowed, **breach}
                    with pytest.raises(error, match=f"^{re.escape(text)}") as caught:
                        made_by(arguments.pop("x"), arguments)
                    assert caught.type is error
                    assert "\n" not in str(caught.value)
                    tried[name] += 1

        with jax.enable_x64(x.dtype in ("float64", "complex128")):
            # While it is traced, JAX would write down whatever is computed, of x or not.
            assert not jax.make_jaxpr(everything_bad)(x).eqns

    bad_calls_are_answered()
    assert min(tried.values()) > 3_000
    assert tried.total() >= 10_000
