"""Group normalization as a pure function: axes → moments → coefficients → output."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Bool, Num

from jgn._activation import ActivationWithoutArrays, split_activation
from jgn._axes import Axes, channels_of_x, check_num_groups, resolve_axes
from jgn._blocks import ComplexPositions, PositionsInBlocks
from jgn._devices import is_traced_for, split_as
from jgn._groups import Groups
from jgn._messages import shown
from jgn._moments import (
    MOMENTS,
    SUMS,
    Reduction,
    Shards,
    is_constant,
    kept,
    mean,
    zero_where,
)
from jgn._parts import PositionsInParts
from jgn._positions import Positions


def group_norm(
    x: Num[ArrayLike, "*shape"],
    num_groups: int,
    scale: Num[ArrayLike, "*batch channels"] | None = None,
    bias: Num[ArrayLike, "*batch channels"] | None = None,
    *,
    epsilon: float = 1e-5,
    channel_axis: int = -1,
    reduction_axes: int | Collection[int] | None = None,
    mask: Bool[ArrayLike, "*broadcastable"] | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    activation: Callable[[Array], Array] | None = None,
    dtype: DTypeLike | None = None,
) -> Num[Array, "*shape"]:
    """Normalizes each group of each sample to zero mean and unit variance.

    With the mean μ and the biased variance σ² over one sample's one group,
    its channels and all its positions,

        y = scale · (x − μ) / √(σ² + epsilon) + bias

    `num_groups=1` is layer normalization over the channels and all
    positions, and `num_groups` equal to the channels is instance
    normalization. The statistics come from x in training and evaluation
    alike. Derivatives of every order, forward and reverse, come from JAX;
    for the backward pass only x, scale and bias, a mask if there is one, and
    a few numbers a group are kept, with an activation too.

    Args:
        x: Any shape of rank 1 or more, by default (batch, *spatial,
            channels). float16, bfloat16, float32, float64, complex64 or
            complex128; integers and booleans become what `jnp.mean` makes of
            them. Moments are computed in float32 at least.
        num_groups: How many groups of contiguous channels to form; it
            divides the channels.
        scale: Factor of each channel, (channels,), or of each sample's
            channels, (*batch, channels). None: 1.
        bias: Offset of each channel, of the same shapes. None: 0.
        epsilon: Added to the variance, in x's units squared. Note that
            flax's default is 1e-6.
        channel_axis: The axis of the channels. 0 means that there is no
            batch axis, unless `reduction_axes` says otherwise.
        reduction_axes: The axes to reduce, the channel axis among them; all
            others are batch axes. None: all but axis 0, or all where that is
            the channel axis.
        mask: Broadcastable to x; True counts toward the moments. All
            positions are normalized. Where it is False, x may hold anything:
            a value that is not finite, or whose square would not be, is read
            as 0. A group without any True has mean 0 and variance 0, so y is
            scale · x / √epsilon + bias.
        axis_name: Mapped axes, as in `jax.lax.psum`, over which the moments
            are shared, weighted by how many elements each shard counts.
        axis_index_groups: Which indices along `axis_name` share moments, as
            in `jax.lax.psum`, which takes them under `jax.pmap`, and under
            `jax.shard_map` with `check_vma=False`.
        activation: An elementwise function such as `jax.nn.silu`, applied to
            y before it is rounded to the output's dtype; or one that is a
            pytree, such as `nnx.PReLU()` or an equinox module, a method of
            one, or a `functools.partial`, whose arrays have gradients, too.
            What else it refers to is read when a call is traced, as under
            `jax.jit`, and kept until `jax.clear_caches()`; another function
            object is traced anew.
        dtype: The dtype of the output. None: that of x, once promoted.

    Returns:
        y, of x's shape. A group of one element, or of equal ones (of up to
        1e22 in float32), gives bias exactly. A NaN or an infinity reaches its
        own sample's own group only.

    Raises:
        ValueError: `num_groups` does not divide the channels, or their number
            is symbolic; an axis is out of range, repeated or missing; scale,
            bias or mask has another shape; activation changes the shape, or
            gives complex numbers for a real output; epsilon is negative or
            not finite; `axis_index_groups` comes without `axis_name`, or has
            no group, or an empty one.
        TypeError: x, scale, bias, mask or dtype has an unusable dtype; a
            count, an axis or an index is not an integer, epsilon not a
            number, `axis_name` not one or more names; activation is not
            callable, or not hashable apart from its arrays.
        NameError: no axis named `axis_name` is mapped.
        NotImplementedError: JAX has no `axis_index_groups` there.

    Example:
        >>> import jax.numpy as jnp, jgn
        >>> x = jnp.array([[1., 3., 10., 30.]])      # one sample, 4 channels
        >>> jgn.group_norm(x, num_groups=2).round(3)  # (1, 3) and (10, 30)
        Array([[-1.,  1., -1.,  1.]], dtype=float32)

    References:
        Wu and He, Group Normalization, 2018,
        https://arxiv.org/abs/1803.08494
    """
    x = as_numbers(x, "x")
    axes = resolve_axes(x.ndim, channel_axis, reduction_axes)
    num_groups = check_num_groups(
        num_groups, x.shape[axes.channel], hint=channels_of_x(x.shape, axes)
    )
    input_dtype = jax.eval_shape(jnp.mean, x).dtype if _is_integral(x.dtype) else x.dtype
    output_dtype = input_dtype if dtype is None else _checked_output_dtype(dtype, input_dtype)
    arrays, activation_without = split_activation(activation)
    return _group_norm(
        x,
        None if scale is None else _checked_per_channel(scale, "scale", x, axes),
        None if bias is None else _checked_per_channel(bias, "bias", x, axes),
        None if mask is None else _checked_mask(mask, x),
        arrays,
        num_groups=num_groups,
        epsilon=checked_epsilon(epsilon),
        axes=axes,
        shards=_shards(axis_name, axis_index_groups),
        activation_without=activation_without,
        compute_dtype=_widest(input_dtype, output_dtype, jnp.float32),
        output_dtype=output_dtype,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        "num_groups",
        "epsilon",
        "axes",
        "shards",
        "activation_without",
        "compute_dtype",
        "output_dtype",
    ),
)
def _group_norm(
    x: Array,
    scale: Array | None,
    bias: Array | None,
    mask: Array | None,
    activation_arrays: list[Array | None],
    *,
    num_groups: int,
    epsilon: float,
    axes: Axes,
    shards: Shards,
    activation_without: ActivationWithoutArrays,
    compute_dtype: Any,
    output_dtype: Any,
) -> Array:
    if math.prod(x.shape) == 0:
        return x.astype(output_dtype)
    if mask is not None:
        mask = split_as(x, range(x.ndim - mask.ndim, x.ndim), mask)
        mask = mask.reshape((1,) * (x.ndim - mask.ndim) + mask.shape)

    def widened(x: Array) -> Array:
        x = x.astype(compute_dtype)
        if mask is None:
            return x
        # So that 0 · x = 0 under the mask, whatever multiplies x in the backward pass.
        return jnp.where(mask | (jnp.abs(x) < math.sqrt(jnp.finfo(x.dtype).max)), x, 0)

    # Whatever k and q are, μ and σ² are the same, and so are all derivatives without theirs.
    stopped = widened(lax.stop_gradient(x))
    positions = positions_of(x, axes, compute_dtype)
    groups = Groups(stopped, axes, num_groups, positions)
    reduction = Reduction(positions, groups, mask, shards)
    k, q, n = reduction.shifts(stopped)
    residuals = MOMENTS if positions.on_one_cpu else SUMS
    activation = activation_without.with_arrays(activation_arrays)

    # The barrier before x keeps XLA from merging the differences x − k of the forward pass with
    # those of the backward pass, which would keep a second array of x's size in between. (With one
    # before x alone, JAX fails wherever a `jax.checkpoint` around this one saves more.) Groups of
    # one position do without, as kernels may contain their sums: see `Positions.once_a_channel`.
    @functools.partial(
        jax.checkpoint,
        policy=jax.checkpoint_policies.save_only_these_names(residuals),
        prevent_cse=positions.number != 1,
    )
    def normalized(x, k, q, n, scale, bias):
        scale = None if scale is None else _rows(scale.astype(compute_dtype), x, axes)
        bias = None if bias is None else _rows(bias.astype(compute_dtype), x, axes)
        y = _normalize(widened(x), k, q, n, scale, bias, reduction, epsilon)
        y = y if activation is None else _activated(y, activation, output_dtype)
        return y.astype(output_dtype)

    return normalized(x, k, q, n, scale, bias)


def positions_of(x: Array, axes: Axes, dtype: Any) -> Positions:
    """The spatial axes of x, which is summed in this dtype, in the way that the device wants."""
    if is_traced_for("gpu"):
        return PositionsInParts(x, axes)
    if not is_traced_for("cpu"):
        return Positions(x, axes)
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return ComplexPositions(x, axes) if is_complex else PositionsInBlocks(x, axes)


def _normalize(
    x: Array,
    k: Array,
    q: Array,
    n: Array,
    scale: Array | None,
    bias: Array | None,
    reduction: Reduction,
    epsilon: float,
) -> Array:
    """y = scale · (x − μ) / √(σ² + ε) + bias = (x − pivot) · a + b."""
    positions = reduction.positions
    m, measured = reduction.moments(x, k, q, n)
    constant = is_constant(m, measured)
    sigma_squared = zero_where(constant, measured)
    r = kept(_inverse_sqrt(sigma_squared + epsilon), MOMENTS)

    pivot, rest = mean(k, m, measured)
    rest = zero_where(constant, rest)  # Then x − pivot = 0, and y = bias.
    pivot, rest = map(reduction.groups.once_a_group, (pivot, rest))
    rest, a = reduction.to_channels(rest, r.astype(x.dtype), x)
    a = a if scale is None else a * scale
    b = -rest * a
    b = b if bias is None else b + bias
    pivot, a, b = positions.once_a_channel(reduction.groups.spread(pivot), a, b)

    a, b = positions.spread(positions.pair(a, b))
    # What has passed a barrier would have a gradient.
    return (x - positions.along(lax.stop_gradient(pivot))) * a + b


def _activated(y: Array, activation: Callable[[Array], Array], output_dtype: Any) -> Array:
    activated = activation(y)
    if getattr(activated, "shape", None) != y.shape:
        got = f"shape {activated.shape}" if hasattr(activated, "shape") else shown(activated)
        raise ValueError(f"activation must be elementwise: got {got} for an x of shape {y.shape}.")
    if jnp.iscomplexobj(activated) and not jnp.issubdtype(output_dtype, jnp.complexfloating):
        raise ValueError(
            f"activation must give real numbers for an output of {output_dtype}: "
            f"got {activated.dtype}."
        )
    return activated


def _inverse_sqrt(x: Array) -> Array:
    """1/√x, and 0 for x = 0: a group without variance or epsilon is all bias.

    Unlike those of `lax.rsqrt`, the intermediate values of its derivative stay in range wherever x
    itself does.
    """
    is_zero = x == 0
    root = jnp.sqrt(lax.select(is_zero, jnp.ones_like(x), x))
    # Of a root itself XLA:CPU would approximate the reciprocal, in each loop in its own way.
    return 1 / lax.select(is_zero, jnp.full_like(x, jnp.inf), root)


def _rows(values: Array, x: Array, axes: Axes) -> Array:
    """Gives (channels,) the rank of (*batch, channels), and explicit shardings those of x."""
    missing = len(axes.batch) + 1 - values.ndim
    values = split_as(x, (*axes.batch, axes.channel)[missing:], values)
    return jnp.expand_dims(values, range(missing))


def as_numbers(value: Any, name: str) -> Array:
    array = _as_array(value, f"{name} must be an array of numbers")
    if array.dtype not in _FLOATING and not _is_integral(array.dtype):
        raise TypeError(
            f"{name} must be {', '.join(map(str, _FLOATING))}, integer or boolean: "
            f"got {array.dtype}."
        )
    return array


def _as_array(value: Any, rule: str) -> Array:
    # To convert one is an operation, which `jax.debug_nans` stops if a NaN is under the mask.
    if isinstance(value, Array):
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # The last are torch's.
        got, dtype = shown(value), str(getattr(value, "dtype", ""))
        got = got if dtype in got else f"{got} of dtype {dtype}"
        raise TypeError(f"{rule}: got {got}.") from error


_FLOATING = tuple(
    map(jnp.dtype, ("float16", "bfloat16", "float32", "float64", "complex64", "complex128"))
)


def _widest(*dtypes: Any) -> Any:
    with jax.numpy_dtype_promotion("standard"):  # Whatever it is for the user's own arrays.
        return functools.reduce(jnp.promote_types, dtypes)


def _is_integral(dtype: Any) -> bool:
    # Of integers of 2 bits jnp.mean makes no floating numbers.
    is_wide_integer = jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits > 2
    return dtype == jnp.bool_ or is_wide_integer


def _checked_output_dtype(dtype: DTypeLike, input_dtype: Any) -> Any:
    try:
        output_dtype = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype must be floating or complex: got {shown(dtype)}.") from None
    if output_dtype not in _FLOATING:
        raise TypeError(f"dtype must be floating or complex: got {output_dtype}.")
    if jnp.issubdtype(input_dtype, jnp.complexfloating) and not jnp.issubdtype(
        output_dtype, jnp.complexfloating
    ):
        raise TypeError(f"dtype must be complex for a complex x: got {output_dtype}.")
    return output_dtype


def _checked_per_channel(value: Any, name: str, x: Array, axes: Axes) -> Array:
    values = as_numbers(value, name)
    channels = x.shape[axes.channel]
    rows = (*(x.shape[axis] for axis in axes.batch), channels)
    if values.shape not in ((channels,), rows):
        shapes = " or ".join(dict.fromkeys([f"({channels},)", str(rows)]))
        raise ValueError(
            f"{name} must have one value a channel, shape {shapes}, for an x of shape {x.shape}: "
            f"got shape {values.shape}."
        )
    if jnp.iscomplexobj(values) and not jnp.iscomplexobj(x):
        raise TypeError(f"{name} must be real for a real x: got {values.dtype} for {x.dtype}.")
    return values


def _checked_mask(mask: Any, x: Array) -> Array:
    mask = _as_array(mask, "mask must be an array of booleans")
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be boolean: got {mask.dtype}; write mask != 0.")
    trailing = x.shape[x.ndim - mask.ndim :]
    if mask.ndim > x.ndim or any(
        m not in (1, size) for m, size in zip(mask.shape, trailing, strict=True)
    ):
        raise ValueError(
            f"mask must be broadcastable to x: got shape {mask.shape} for an x of shape {x.shape}; "
            "give it x's rank, with size 1 where it does not vary."
        )
    return mask


def checked_epsilon(epsilon: Any) -> float:
    try:
        boolean = isinstance(epsilon, bool) or getattr(epsilon, "dtype", None) == jnp.bool_
        if boolean or isinstance(epsilon, str | bytes | bytearray):
            raise TypeError
        value = float(epsilon)
    except OverflowError:
        value = math.inf
    except (TypeError, ValueError):
        raise TypeError(
            f"epsilon must be a number known when the call is traced: got {shown(epsilon)}."
        ) from None
    if not 0 <= value < math.inf:
        raise ValueError(f"epsilon must be finite and not negative: got {value}.")
    return value


def _shards(axis_name: Any, axis_index_groups: Any) -> Shards:
    if axis_name is None and axis_index_groups is not None:
        raise ValueError(
            f"axis_index_groups needs axis_name: got {axis_index_groups} with axis_name=None."
        )
    try:
        names = axis_name if axis_name is None or isinstance(axis_name, str) else tuple(axis_name)
        hash(names)
    except TypeError:
        raise TypeError(f"axis_name must be one or more names: got {shown(axis_name)}.") from None
    if axis_index_groups is None:
        return Shards(names, None)
    try:
        groups = tuple(tuple(map(operator.index, indices)) for indices in axis_index_groups)
    except TypeError:
        raise TypeError(
            "axis_index_groups must be a sequence of groups of indices: "
            f"got {shown(axis_index_groups)}."
        ) from None
    if not groups or not all(groups):
        raise ValueError(
            "axis_index_groups must be one or more groups of one or more indices: "
            f"got {shown(axis_index_groups)}."
        )
    return Shards(names, groups)
