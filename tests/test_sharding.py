"""Eight devices: values equal the unsharded ones, and only moments travel between devices."""

import contextlib
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import Oracle, promised, tolerance

import jgn

SHAPE = (8, 16, 32, 64)
X = np.random.default_rng(0).normal(2, 3, SHAPE).astype(np.float32)
SCALE = np.linspace(0.5, 2, SHAPE[-1], dtype=np.float32)
BIAS = np.linspace(-1, 1, SHAPE[-1], dtype=np.float32)
COTANGENT = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)
ALIGNED, SPANNING = 8, 2  # groups: one a device when the channels are split, or one over four

AXIS_TYPES = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "c64": 8}
COLLECTIVE = re.compile(r"= (.+?) ((?:all-|collective-|reduce-scatter|ragged-)[\w-]*)\(")

pytestmark = pytest.mark.skipif(
    jax.device_count() < 8, reason="needs eight devices; a CPU simulates them, see conftest.py"
)


def mesh_of(axis_type, **sizes):
    axis_types = (axis_type,) * len(sizes)
    devices = jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types, devices=devices)


def collectives(compiled):
    """The kind and the bytes of every collective of a compiled program."""
    return [
        (
            kind,
            sum(
                BYTES[dtype] * math.prod(int(size) for size in sizes.split(",") if size)
                for dtype, sizes in re.findall(r"(\w+)\[([\d,]*)\]", result)
            ),
        )
        for result, kind in COLLECTIVE.findall(compiled.as_text())
    ]


def traffic(compiled):
    """The bytes of all of them."""
    return sum(size for _, size in collectives(compiled))


def moments(values, parts=1):
    """The sum of the sample; those of d and d², as one; and those of the backward pass, as one."""
    one, two = (
        [(kind, n * number * X.itemsize) for kind, number in values] for n in (1, 2 * parts)
    )
    return one + two, one + two + two


def normalized(x, num_groups):
    return jgn.group_norm(x, num_groups)


def x_gradient(x, num_groups):
    return jax.grad(lambda x: (jgn.group_norm(x, num_groups) ** 3).sum())(x)


def compiled_for(function, mesh, spec, num_groups):
    x = jax.device_put(X, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        return jax.jit(lambda x: function(x, num_groups)).lower(x).compile()


LAYOUTS = {
    "batch": ({"a": 8}, P("a")),
    "height": ({"a": 8}, P(None, "a")),
    "width": ({"a": 8}, P(None, None, "a")),
    "channels": ({"a": 8}, P(None, None, None, "a")),
    "batch and space": ({"a": 2, "b": 4}, P("a", "b")),
    "batch and channels": ({"a": 2, "b": 4}, P("a", None, None, "b")),
    "space and channels": ({"a": 2, "b": 4}, P(None, "a", None, "b")),
    "both axes on space": ({"a": 2, "b": 4}, P(None, ("a", "b"))),
    "both axes on channels": ({"a": 2, "b": 4}, P(None, None, None, ("a", "b"))),
}
CASES = pytest.mark.parametrize(
    ("layout", "num_groups"), list(itertools.product(LAYOUTS, (ALIGNED, SPANNING)))
)


def value_and_gradients(num_groups, x, scale, bias, cotangent):
    y, vjp = jax.vjp(lambda x, s, b: jgn.group_norm(x, num_groups, s, b), x, scale, bias)
    return y, vjp(cotangent)


@functools.cache
def wanted_of(num_groups):
    oracle = Oracle(X, num_groups, SCALE, BIAS)
    return oracle.y, oracle.gradients(COTANGENT)


@AXIS_TYPES
@CASES
def test_values_and_gradients_equal_the_unsharded_ones(layout, num_groups, axis_type):
    sizes, spec = LAYOUTS[layout]
    mesh = mesh_of(axis_type, **sizes)
    sharding = NamedSharding(mesh, spec)
    x, cotangent = jax.device_put(X, sharding), jax.device_put(COTANGENT, sharding)
    with jax.set_mesh(mesh):
        sharded = jax.jit(functools.partial(value_and_gradients, num_groups))
        y, gradients = sharded(x, SCALE, BIAS, cotangent)
    wanted_y, wanted_gradients = wanted_of(num_groups)
    of_a_group, of_a_channel = (
        share("float32", X.size // SHAPE[-1]) for share in (promised, tolerance)
    )
    for actual, wanted, share in zip(
        (y, *gradients),
        (wanted_y, *wanted_gradients),
        (of_a_group, of_a_group, of_a_channel, of_a_channel),
        strict=True,
    ):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=share * np.abs(wanted).max())
    assert y.sharding.is_equivalent_to(sharding, y.ndim), "the output keeps x's sharding"
    assert gradients[0].sharding.is_equivalent_to(sharding, y.ndim), "and so does x's gradient"


@pytest.mark.parametrize("layout", ["batch", "height", "width", "space and channels"])
def test_values_and_gradients_equal_the_unsharded_ones_in_the_form_of_gpus(layout, traced_for):
    traced_for("gpu")
    test_values_and_gradients_equal_the_unsharded_ones(layout, SPANNING, AxisType.Auto)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("axis_type", "devices"), [(AxisType.Auto, 1), (AxisType.Auto, 2), (AxisType.Explicit, 2)]
)
@pytest.mark.parametrize(
    ("shape", "num_groups", "spec"),
    [
        ((6, 3, 4, 3), 3, P("a")),
        ((2, 62, 12), 12, P("a")),
        ((2, 4, 7, 12), 2, P(None, "a")),
        ((2, 46, 46, 7), 7, P(None, "a")),
        ((2, 3, 5, 24), 2, P(None, None, None, "a")),
    ],
)
def test_a_mean_of_a_million_deviations_costs_no_digit(
    shape, num_groups, spec, axis_type, devices, masked, backend
):
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(mean, 1, shape).astype(np.float32) for mean in (1e6, 0))
    mask = rng.random((1, *shape[1:-1], 1)) < 0.7 if masked else None

    def normalized(x):
        return jgn.group_norm(x, num_groups, mask=mask)

    def value_and_gradient(x, cotangent):
        y, vjp = jax.vjp(normalized, x)
        return y, *vjp(cotangent)

    mesh = mesh_of(axis_type, a=devices)
    with jax.set_mesh(mesh):
        placed = (jax.device_put(array, NamedSharding(mesh, spec)) for array in (x, cotangent))
        y, gradient = jax.jit(value_and_gradient)(*placed)
    oracle = Oracle(x, num_groups, mask=mask)
    for actual, wanted in ((y, oracle.y), (gradient, oracle.gradients(cotangent).x)):
        assert np.all(np.abs(actual - wanted) <= 1e-6 * oracle.largest(wanted))


@pytest.mark.parametrize(
    ("axis_type", "spec"),
    [(AxisType.Auto, P("a")), (AxisType.Auto, P(None, "a")), (AxisType.Explicit, P(None, "a"))],
)
@pytest.mark.parametrize(("size", "channels"), [(8, 128), (16, 128), (32, 128), (56, 16), (64, 16)])
def test_neither_a_border_nor_a_pattern_is_all_of_a_shared_sample(size, channels, spec, axis_type):
    mesh = mesh_of(axis_type, a=8)
    image = np.random.default_rng(0).normal(3, 1, (8, size, size, channels)).astype(np.float32)
    framed, first_row, first_column, corner, moved_apart = (image.copy() for _ in range(5))
    framed[:, [0, -1]] = framed[:, :, [0, -1]] = 0
    first_row[:, 0] *= 30
    first_column[:, :, 0] *= 30
    corner[:, 0, 0] *= 1e4
    for phase, sample in enumerate(moved_apart):
        # Of 32 positions two of each 8 are taken: README's Limits say what their own phases cost.
        between = np.arange(size) % 8 != (0 if size == 32 else phase)
        sample[between] = sample[:, between] = 0
    with jax.set_mesh(mesh):
        for x in (framed, first_row, first_column, corner, moved_apart):
            y = jgn.group_norm(jax.device_put(x, NamedSharding(mesh, spec)), 2)
            wanted = Oracle(x, 2).y
            assert np.abs(y - wanted).max() <= 1e-6 * np.abs(wanted).max()


@AXIS_TYPES
@pytest.mark.parametrize("function", [normalized, x_gradient])
@pytest.mark.parametrize("layout", ["batch", "channels", "batch and channels"])
def test_whole_groups_on_a_device_need_no_collective(layout, function, axis_type):
    sizes, spec = LAYOUTS[layout]
    compiled = compiled_for(function, mesh_of(axis_type, **sizes), spec, ALIGNED)
    assert collectives(compiled) == []


@AXIS_TYPES
def test_parameter_gradients_are_the_only_traffic_of_a_split_batch(axis_type):
    mesh = mesh_of(axis_type, a=8)
    x = jax.device_put(X, NamedSharding(mesh, P("a")))

    def gradients(x, scale, bias):
        return jax.grad(
            lambda x, scale, bias: (jgn.group_norm(x, ALIGNED, scale, bias) ** 3).sum(), (0, 1, 2)
        )(x, scale, bias)

    with jax.set_mesh(mesh):
        compiled = jax.jit(gradients).lower(x, SCALE, BIAS).compile()
    assert traffic(compiled) == SCALE.nbytes + BIAS.nbytes


@AXIS_TYPES
@pytest.mark.parametrize("layout", ["height", "width", "batch and space", "both axes on space"])
def test_split_space_needs_two_small_all_reduces_and_one_more_backward(layout, axis_type, backend):
    sizes, spec = LAYOUTS[layout]
    mesh = mesh_of(axis_type, **sizes)
    samples = SHAPE[0] // (sizes["a"] if layout == "batch and space" else 1)
    # On GPUs rows are summed first, which are shared where the width is split.
    rows = layout == "width" and axis_type == AxisType.Auto and jax.default_backend() == "gpu"
    forward, both = moments([("all-reduce", samples * SHAPE[-1])], SHAPE[1] if rows else 1)
    assert collectives(compiled_for(normalized, mesh, spec, ALIGNED)) == forward
    assert collectives(compiled_for(x_gradient, mesh, spec, ALIGNED)) == both


# Of 184, 23 have no whole blocks.
@pytest.mark.parametrize("size", [8, 16, 24, 120, 128, 184, 224])
@pytest.mark.parametrize("told_by", ["its place", "in_shardings and the mesh"])
def test_however_long_a_split_axis_only_moments_travel(size, told_by, backend):
    mesh = mesh_of(AxisType.Auto, a=8)
    sharding = NamedSharding(mesh, P(None, "a"))
    x = np.zeros((2, size, 8, 16), np.float32)
    if told_by == "its place":
        compiled = jax.jit(lambda x: jgn.group_norm(x, 4)).lower(jax.device_put(x, sharding))
    else:
        with jax.set_mesh(mesh):
            compiled = jax.jit(lambda x: jgn.group_norm(x, 4), in_shardings=sharding).lower(x)
    forward, _ = moments([("all-reduce", 2 * 16)])
    assert collectives(compiled.compile()) == forward


@pytest.mark.parametrize("spec", [P("a", None, "b"), P("b", "a"), P(None, ("a", "b"))])
@pytest.mark.parametrize("sizes", [{"a": 2, "b": 3}, {"a": 3, "b": 2}])
def test_on_devices_of_no_power_of_two_nothing_else_travels_either(sizes, spec):
    mesh = mesh_of(AxisType.Auto, **sizes)
    x = jax.ShapeDtypeStruct((6, 96, 96, 16), "float32", sharding=NamedSharding(mesh, spec))
    compiled = jax.jit(normalized, static_argnums=1).lower(x, 4).compile()
    assert {kind for kind, _ in collectives(compiled)} == {"all-reduce"}


@AXIS_TYPES
def test_a_split_axis_may_be_symbolic(axis_type):
    mesh = mesh_of(axis_type, a=8)
    sharding = NamedSharding(mesh, P(None, "a"))
    sizes = jax.export.symbolic_shape("n, 8*h, w, 16")
    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct(sizes, "float32", sharding=sharding)
        exported = jax.export.export(jax.jit(lambda x: jgn.group_norm(x, 4)))(x)
        if axis_type == AxisType.Explicit:
            return  # Nothing of such sizes, not even x + 1, does JAX run on such a mesh.
        for height, width in ((8, 1), (48, 20)):
            x = np.random.default_rng(0).normal(2, 3, (2, height, width, 16)).astype(np.float32)
            y = jax.jit(exported.call)(jax.device_put(x, sharding))
            wanted = Oracle(x, 4).y
            assert np.abs(y - wanted).max() <= 1e-6 * np.abs(wanted).max()


@AXIS_TYPES
@pytest.mark.parametrize(
    "layout",
    ["channels", "batch and channels", "space and channels", "both axes on channels"],
)
def test_groups_over_several_devices_exchange_moments_only(layout, axis_type):
    sizes, spec = LAYOUTS[layout]
    mesh = mesh_of(axis_type, **sizes)
    samples = SHAPE[0] // (sizes["a"] if layout == "batch and channels" else 1)
    values = []
    if layout == "space and channels":
        values.append(("all-reduce", samples * SHAPE[-1] // sizes["b"]))
    if axis_type == AxisType.Auto:
        values.append(("all-reduce", samples))  # A device has channels of one group only.
    else:
        values.append(("all-gather", samples * SHAPE[-1]))
    forward, both = moments(values)
    assert collectives(compiled_for(normalized, mesh, spec, SPANNING)) == forward
    assert collectives(compiled_for(x_gradient, mesh, spec, SPANNING)) == both


def of_the_layer(num_groups, variables, x):
    def loss(variables, x):
        y = jgn.GroupNorm(num_groups).apply(variables, x)
        return (y**3).sum(), y

    gradients, y = jax.grad(loss, (0, 1), has_aux=True)(variables, x)
    return y, gradients


@functools.cache
def of_the_unsharded_layer(num_groups):
    variables = jgn.GroupNorm(num_groups).init(jax.random.key(0), X)
    return jax.jit(functools.partial(of_the_layer, num_groups))(variables, X)


@CASES
def test_the_layer_works_on_explicit_meshes(layout, num_groups):
    sizes, spec = LAYOUTS[layout]
    mesh = mesh_of(AxisType.Explicit, **sizes)
    x = jax.device_put(X, NamedSharding(mesh, spec))
    with jax.set_mesh(mesh):
        variables = jgn.GroupNorm(num_groups).init(jax.random.key(0), x)
        actual = jax.jit(functools.partial(of_the_layer, num_groups))(variables, x)
    expected = of_the_unsharded_layer(num_groups)
    for found, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        atol = 1e-4 * np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=atol)


@AXIS_TYPES
@pytest.mark.parametrize("in_context", [True, False])
@pytest.mark.parametrize("split", [P(None, "a"), P(None, None, "a"), P(None, None, None, "a")])
def test_a_mask_from_elsewhere_does_not_travel(split, in_context, axis_type, backend):
    """Only counts and sums of every sample's channel do; on GPUs those of its rows."""
    mesh = mesh_of(axis_type, a=8)
    x = jax.device_put(X, NamedSharding(mesh, split))
    mask = np.random.default_rng(3).random(SHAPE) < 0.7
    masked = jax.jit(lambda x, mask: jgn.group_norm(x, ALIGNED, mask=mask))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        compiled = masked.lower(x, mask).compile()
        y = masked(x, mask)
    rows = SHAPE[1] if jax.default_backend() == "gpu" and split == P(None, None, "a") else 1
    assert traffic(compiled) <= (2 + 4 * rows) * SHAPE[0] * SHAPE[-1] * X.itemsize
    wanted = jgn.group_norm(X, ALIGNED, mask=mask)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_shared_statistics_equal_the_unsharded_ones(masked, check_vma, backend):
    mask = np.ones((SHAPE[0], SHAPE[1], 1, 1), bool)
    if masked:  # The last device of the first samples counts nothing at all.
        mask = np.arange(SHAPE[1]).reshape(1, -1, 1, 1) < np.arange(9, 17).reshape(-1, 1, 1, 1)
    mesh = mesh_of(AxisType.Auto, a=8)

    def shared(x, mask):
        return jgn.group_norm(x, ALIGNED, axis_name="a", mask=mask if masked else None)

    sharded = jax.shard_map(
        shared, mesh=mesh, in_specs=P(None, "a"), out_specs=P(None, "a"), check_vma=check_vma
    )

    def whole(x, mask):
        return jgn.group_norm(x, ALIGNED, mask=mask)

    def gradient(function):
        return jax.jit(jax.grad(lambda x: (COTANGENT * mask * function(x, mask)).sum()))(X)

    np.testing.assert_allclose(sharded(X, mask), whole(X, mask), rtol=0, atol=5e-6)
    np.testing.assert_allclose(gradient(sharded), gradient(whole), rtol=0, atol=5e-6)
    three_a_channel = 3 * SHAPE[0] * SHAPE[-1] * X.itemsize  # at most
    forward = jax.jit(sharded).lower(X, mask).compile()
    assert [kind for kind, _ in collectives(forward)] == ["all-reduce"] * 2
    assert traffic(forward) <= three_a_channel
    gradient_of = jax.jit(jax.grad(lambda x: (COTANGENT * mask * sharded(x, mask)).sum()))
    both = gradient_of.lower(X).compile()
    assert [kind for kind, _ in collectives(both)] == ["all-reduce"] * 3
    assert traffic(both) <= 2 * three_a_channel


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_mask_may_lie_on_more_devices_than_x_is_split_over(check_vma):
    mesh = mesh_of(AxisType.Auto, a=2, b=4)
    mask = np.random.default_rng(2).random((*SHAPE[:3], 1)) < 0.7
    split = P(None, "a", None, "b")  # The mask has one channel, the same for every device of b.
    shared = jax.shard_map(
        lambda x, mask: jgn.group_norm(x, 1, mask=mask, axis_name=("a", "b")),
        mesh=mesh,
        in_specs=(split, P(None, "a")),
        out_specs=split,
        check_vma=check_vma,
    )

    def gradient(function):
        return jax.jit(jax.grad(lambda x: (COTANGENT * function(x)).sum()))(X)

    def whole(x):
        return jgn.group_norm(x, 1, mask=mask)

    np.testing.assert_allclose(shared(X, mask), whole(X), rtol=0, atol=5e-6)
    np.testing.assert_allclose(
        gradient(lambda x: shared(x, mask)), gradient(whole), rtol=0, atol=5e-6
    )


def test_index_groups_share_statistics_among_themselves():
    mesh = mesh_of(AxisType.Auto, a=8)
    halves = [[0, 1, 2, 3], [4, 5, 6, 7]]
    shared = jax.shard_map(
        lambda x: jgn.group_norm(x, ALIGNED, axis_name="a", axis_index_groups=halves),
        mesh=mesh,
        in_specs=P(None, "a"),
        out_specs=P(None, "a"),
        check_vma=False,  # psum itself supports index groups only so.
    )

    def apart(x):
        return jnp.concatenate([jgn.group_norm(half, ALIGNED) for half in jnp.split(x, 2, 1)], 1)

    def gradient(function):
        return jax.jit(jax.grad(lambda x: (COTANGENT * function(x)).sum()))(X)

    np.testing.assert_allclose(shared(X), apart(X), rtol=0, atol=5e-6)
    np.testing.assert_allclose(gradient(shared), gradient(apart), rtol=0, atol=5e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_index_groups_may_differ_in_size(masked):
    mesh = mesh_of(AxisType.Auto, a=8)
    mask = np.ones((), bool) if masked else None
    shared = jax.shard_map(
        lambda x: jgn.group_norm(
            x, ALIGNED, mask=mask, axis_name="a", axis_index_groups=[range(6), [6, 7]]
        ),
        mesh=mesh,
        in_specs=P(None, "a"),
        out_specs=P(None, "a"),
        check_vma=False,
    )
    apart = [jgn.group_norm(part, ALIGNED) for part in np.split(X, [12], axis=1)]
    np.testing.assert_allclose(shared(X), np.concatenate(apart, 1), rtol=0, atol=5e-6)


@pytest.mark.parametrize(
    ("x_spec", "values_spec"),
    [
        (P("data"), P("model")),
        (P("data"), P("data", "model")),
        (P("data", None, None, "model"), P(None, "model")),
        (P(None, "data"), P("model")),
        (P(), P("data", "model")),
    ],
)
@pytest.mark.parametrize("num_groups", [1, SPANNING])
def test_a_scale_and_a_bias_may_lie_otherwise_than_x(x_spec, values_spec, num_groups):
    mesh = mesh_of(AxisType.Explicit, data=2, model=4)
    rows = len(values_spec) == 2
    scale, bias = (np.tile(v, (SHAPE[0], 1)) if rows else v for v in (SCALE, BIAS))
    wanted = jgn.group_norm(X, num_groups, scale, bias)

    def gradients(*arguments):
        def loss(x, *parameters):
            return (COTANGENT * jgn.group_norm(x, num_groups, *parameters)).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(*arguments)

    wanted_gradients = gradients(X, scale, bias)
    with jax.set_mesh(mesh):
        x = jax.device_put(X, NamedSharding(mesh, x_spec))
        placed = [jax.device_put(v, NamedSharding(mesh, values_spec)) for v in (scale, bias)]
        y = jgn.group_norm(x, num_groups, *placed)
        assert jax.typeof(y).sharding == jax.typeof(x).sharding
        actual_gradients = gradients(x, *placed)
    np.testing.assert_allclose(y, wanted, rtol=0, atol=5e-6)
    for actual, gradient in zip(actual_gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(actual, gradient, rtol=0, atol=1e-5 * np.abs(gradient).max())


@pytest.mark.parametrize(
    ("x_spec", "mask_spec", "in_context"),
    [
        (P("data"), P("model"), True),
        (P("data"), P("data", "model"), True),
        (P("data"), P("data", "model"), False),
        (P(None, "data"), P("data"), False),
        (P(None, "data"), P(None, "model"), True),
        (P(None, None, "data"), P("data"), True),  # The mask has one column.
        (P(), P("data", "model"), False),
    ],
)
def test_a_mask_may_lie_otherwise_than_x(x_spec, mask_spec, in_context):
    mesh = mesh_of(AxisType.Explicit, data=2, model=4)
    counted = np.arange(9, 17)[:, None, None, None]
    mask = np.arange(SHAPE[1])[None, :, None, None] < counted

    def value_and_gradient(x, mask, cotangent):
        y, vjp = jax.vjp(lambda x: jgn.group_norm(x, SPANNING, mask=mask), x)
        return y, *vjp(cotangent)

    wanted = jax.jit(value_and_gradient)(X, mask, COTANGENT)
    x, cotangent = (jax.device_put(v, NamedSharding(mesh, x_spec)) for v in (X, COTANGENT))
    placed = jax.device_put(mask, NamedSharding(mesh, mask_spec))
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        actual = jax.jit(value_and_gradient)(x, placed, cotangent)
    for found, expected in zip(actual, wanted, strict=True):
        assert jax.typeof(found).sharding == jax.typeof(x).sharding
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("num_groups", [ALIGNED, SPANNING])
def test_an_explicit_mesh_needs_no_context(num_groups):
    """x alone, by its place, tells of the mesh."""
    mesh = mesh_of(AxisType.Explicit, data=2, model=4)
    x = jax.device_put(X, NamedSharding(mesh, P("data", None, None, "model")))
    scale = jax.device_put(SCALE, NamedSharding(mesh, P("data")))

    def gradients(x, scale):
        def loss(x, scale):
            return (COTANGENT * jgn.group_norm(x, num_groups, scale)).sum()

        return jax.jit(jax.grad(loss, (0, 1)))(x, scale)

    y = jgn.group_norm(x, num_groups, scale)
    assert jax.typeof(y).sharding == jax.typeof(x).sharding
    np.testing.assert_allclose(y, jgn.group_norm(X, num_groups, SCALE), rtol=0, atol=5e-6)
    for actual, wanted in zip(gradients(x, scale), gradients(X, SCALE), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("in_context", [True, False])
@pytest.mark.parametrize("num_groups", [1, 16])
@pytest.mark.parametrize(("height", "width"), [(16, 32), (1, 31)])  # In padded blocks, too.
def test_an_explicitly_split_axis_may_be_that_of_vmap(height, width, num_groups, in_context):
    mesh = mesh_of(AxisType.Explicit, a=8)
    samples, cotangents = (v[:, None, :height, :width] for v in (X, COTANGENT))

    def one(x, cotangent):
        y, vjp = jax.vjp(lambda x: jgn.group_norm(x, num_groups), x)
        return y, *vjp(cotangent)

    wanted = jax.vmap(one)(samples, cotangents)
    split = [jax.device_put(v, NamedSharding(mesh, P("a"))) for v in (samples, cotangents)]
    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        actual = jax.jit(jax.vmap(one))(*split)
    for found, expected in zip(actual, wanted, strict=True):
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-6)


def test_of_index_groups_under_vmap_jax_has_none():
    def shared(x):
        return jgn.group_norm(x, 2, axis_name="a", axis_index_groups=[[0, 1]])

    with pytest.raises(NotImplementedError, match="axis_index_groups"):
        jax.vmap(shared, axis_name="a")(jnp.ones((2, 3, 4)))


def test_an_axis_of_vmap_can_share_statistics():
    parts = jnp.asarray(X).reshape(SHAPE[0], 4, 4, *SHAPE[2:])
    y = jax.vmap(
        lambda x: jgn.group_norm(x, ALIGNED, axis_name="parts"),
        in_axes=1,
        out_axes=1,
        axis_name="parts",
    )(parts)
    np.testing.assert_allclose(y.reshape(SHAPE), jgn.group_norm(X, ALIGNED), rtol=0, atol=5e-6)


def value_and_gradient(x, cotangent):
    y, vjp = jax.vjp(lambda x: jgn.group_norm(x, ALIGNED), x)
    return y, *vjp(cotangent)


def test_of_nothing_the_result_is_placed_as_x():
    mesh = jax.make_mesh((8,), ("a",))
    x = jax.device_put(jnp.zeros((8, 0, 12)), NamedSharding(mesh, P("a")))
    assert jax.typeof(jgn.group_norm(x, 3)).sharding == jax.typeof(x).sharding

    def twice(x):
        return jax.lax.scan(lambda x, _: (jgn.group_norm(x, 3), None), x, None, length=2)[0]

    spec = P("a")
    assert jax.shard_map(twice, mesh=mesh, in_specs=spec, out_specs=spec)(x).shape == x.shape


def in_shard_map(x, cotangent, check_vma):
    mesh = mesh_of(AxisType.Auto, a=8)
    mapped = jax.shard_map(
        value_and_gradient, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=check_vma
    )
    return jax.jit(mapped)(x, cotangent)


def in_pmap(x, cotangent):
    one_a_device = (SHAPE[0], 1, *SHAPE[1:])
    results = jax.pmap(value_and_gradient)(x.reshape(one_a_device), cotangent.reshape(one_a_device))
    return [result.reshape(SHAPE) for result in results]


def on_an_explicit_mesh(x, cotangent):
    mesh = mesh_of(AxisType.Explicit, a=8)
    with jax.set_mesh(mesh):
        split = (jax.device_put(v, NamedSharding(mesh, P("a"))) for v in (x, cotangent))
        return jax.jit(value_and_gradient)(*split)


@pytest.mark.parametrize(
    "on_eight",
    [
        functools.partial(in_shard_map, check_vma=True),
        functools.partial(in_shard_map, check_vma=False),
        in_pmap,
        on_an_explicit_mesh,
    ],
    ids=["shard_map", "shard_map without check_vma", "pmap", "explicit mesh"],
)
def test_whole_samples_are_summed_as_on_a_device_alone(on_eight, traced_for):
    traced_for("cpu")  # Two programs of a GPU's form round the gradient differently.
    parts = zip(np.split(X, 8), np.split(COTANGENT, 8), strict=True)
    alone = [jax.jit(value_and_gradient)(*part) for part in parts]
    for actual, *wanted in zip(on_eight(X, COTANGENT), *alone, strict=True):
        np.testing.assert_array_equal(actual, np.concatenate(wanted))
