"""torch's results, recorded and, where torch is installed, live: outputs and every gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import Oracle, tolerance, unit_roundoff, wide
from record_torch import (
    DTYPES,
    GROUP_COUNTS,
    RECORD,
    RESULTS,
    SHAPES,
    inputs,
    parameter_dtype,
    torch_results,
)

import jgn


@functools.partial(jax.jit, static_argnames="num_groups")
def results_of(x, scale, bias, cotangent, num_groups):
    def normalized(x, scale, bias):
        return jgn.group_norm(x, num_groups, scale, bias, channel_axis=1)

    y, vjp = jax.vjp(normalized, x, scale, bias)
    return y, *vjp(cotangent)


def assert_same(given, wanted, num_groups, dtype):
    """Both round their moments, and round once to the dtype."""
    dtypes = (dtype, parameter_dtype(dtype), parameter_dtype(dtype), dtype)
    x, scale, bias, cotangent = (
        wide(value).astype(jnp.dtype(name)) for value, name in zip(given, dtypes, strict=True)
    )
    with jax.enable_x64(dtype == "float64"):
        actual = jax.device_get(results_of(x, scale, bias, cotangent, num_groups=num_groups))
    # torch forms y as x · a + b and the gradient of scale likewise: where a group hardly varies
    # their terms cancel, as do those of the gradient of x. The terms decide what rounding costs.
    r = Oracle(x, num_groups, channel_axis=1).inverse_deviation
    largest_x, largest_scale, largest_bias, largest_cotangent = (
        np.abs(wide(value)).max() for value in (x, scale, bias, cotangent)
    )
    sizes = (
        r * largest_scale * largest_x + largest_bias,
        r * largest_scale * largest_cotangent,
        r.max() * largest_x * largest_cotangent,
        largest_cotangent,
    )
    result_dtypes = (dtype, *dtypes[:3])
    for name, ours, theirs, size, result_dtype in zip(
        RESULTS, actual, wanted, sizes, result_dtypes, strict=True
    ):
        assert ours.dtype == result_dtype
        allowed = 2 * (
            unit_roundoff(result_dtype) * np.abs(theirs) + tolerance(dtype, x.size) * size
        )
        excess = (np.abs(wide(ours) - wide(theirs)) / allowed).max()
        assert excess <= 1, f"{name} differs by {excess} times what rounding explains"


@pytest.fixture(scope="module")
def recorded():
    with np.load(RECORD) as arrays:
        return dict(arrays)


# Every number of groups in float32, and two in the other dtypes.
@pytest.mark.parametrize(
    ("dtype", "num_groups"),
    [(d, n) for d in DTYPES for n in (GROUP_COUNTS if d == "float32" else (1, 4))],
)
@pytest.mark.parametrize("rank", SHAPES)
def test_the_recorded_results(recorded, rank, dtype, num_groups):
    given = [recorded[f"{name}_{rank}"] for name in ("x", "scale", "bias", "cotangent")]
    stacked = [recorded[f"{name}_{rank}_{dtype}"] for name in RESULTS]
    wanted = [values[GROUP_COUNTS.index(num_groups)] for values in stacked]
    assert_same(given, wanted, num_groups, dtype)


def test_the_record_holds_what_its_script_would_give_torch(recorded):
    for rank, shape in SHAPES.items():
        for name, value in zip(
            ("x", "scale", "bias", "cotangent"), inputs(shape, rank), strict=True
        ):
            np.testing.assert_array_equal(recorded[f"{name}_{rank}"], value)


@pytest.mark.parametrize("seed", range(8))
def test_torch_itself_over_random_shapes(seed):
    pytest.importorskip("torch")
    generator = np.random.default_rng(seed)
    num_groups, group_size = (int(number) for number in generator.integers(1, 7, 2))
    spatial = (int(size) for size in generator.integers(1, 9, generator.integers(1, 4)))
    given = inputs((int(generator.integers(2, 4)), num_groups * group_size, *spatial), seed)
    for dtype in ("float32", "bfloat16"):
        wanted = torch_results(*given, num_groups, dtype)
        assert_same(given, wanted, num_groups, dtype)


def test_a_tensor_in_a_graph_is_refused_with_torchs_own_way_out():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"of dtype torch\.float32\.$") as error:
        jgn.group_norm(torch.ones(2, 4, requires_grad=True), 2)
    assert "detach()" in str(error.value.__cause__)
