"""The flax.nnx layer; `import jgn` alone does not import it, nor flax.nnx."""

import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType, MethodType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype, Initializer
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Num

from jgn._activation import as_pytree, split_activation
from jgn._axes import has_elements, num_groups_from, positive_integer, resolve_axes
from jgn._group_norm import as_numbers, checked_epsilon, group_norm
from jgn._linen import refuse_both


class GroupNorm(nnx.Module):
    """Group normalization layer; see `jgn.group_norm` for the equation and for what x may be.

    Its parameters are `scale` and `bias`, shape (num_features,), as those of `flax.nnx.GroupNorm`,
    whose state it loads. Note that flax's epsilon is 1e-6 by default, and that the output has x's
    dtype. `use_fast_variance` and `promote_dtype` have no counterpart: there is one variance, and
    moments are never computed in less than float32.

    Args:
        num_features: How many channels x has.
        num_groups: How many groups to form; give this or `group_size`, and None for the other.
        group_size: How many channels each group has.
        epsilon: Added to the variance.
        dtype: The dtype of the output. None: that of x.
        param_dtype: The dtype of the parameters.
        use_bias: Whether the layer learns a bias.
        use_scale: Whether the layer learns a scale.
        bias_init: Initializer of the bias.
        scale_init: Initializer of the scale.
        reduction_axes: The axes to reduce, the channel axis among them. None: all but axis 0, or
            all where that is the channel axis.
        axis_name: Mapped axes over which the moments are shared.
        axis_index_groups: Which indices along `axis_name` share moments.
        channel_axis: The axis of the channels.
        activation: An elementwise function applied to the result, such as `nnx.silu`, or a module
            that has parameters alone, such as `nnx.PReLU()`; one that changes a state of its own
            has no place here. What a function refers to is read when a call is traced: later
            changes of a module's parameters in a `lambda` go unseen.
        rngs: Where the initializers take their keys from.
        bias_metadata: Metadata of the bias, such as its sharding.
        scale_metadata: Metadata of the scale.

    Raises:
        ValueError: the groups do not divide `num_features`, or are given by both count and size or
            by neither; a count is less than 1; epsilon is negative or not finite.
        TypeError: a count is not an integer, epsilon not a number; activation is not callable, a
            module that is no pytree, a method of a module or pytree, or not hashable apart from its
            arrays.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> import jgn.nnx
        >>> layer = jgn.nnx.GroupNorm(64, num_groups=8, activation=nnx.silu, rngs=nnx.Rngs(0))
        >>> layer(jax.numpy.ones((2, 16, 16, 64))).shape
        (2, 16, 16, 64)
    """

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: float = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = nnx.initializers.zeros,
        scale_init: Initializer = nnx.initializers.ones,
        reduction_axes: int | Collection[int] | None = None,
        axis_name: str | Sequence[str] | None = None,
        axis_index_groups: Sequence[Sequence[int]] | None = None,
        channel_axis: int = -1,
        activation: Callable[[Array], Array] | None = None,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ):
        self.num_features: int = positive_integer(num_features, "num_features")
        self.num_groups: int = num_groups_from(num_groups, group_size, self.num_features)
        self.group_size: int = self.num_features // self.num_groups
        self.epsilon: float = checked_epsilon(epsilon)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.reduction_axes: int | Collection[int] | None = (
            tuple(reduction_axes) if has_elements(reduction_axes) else reduction_axes
        )
        self.axis_name: str | tuple[str, ...] | None = _hashable(axis_name)
        self.axis_index_groups: tuple[tuple[int, ...], ...] | None = _hashable(axis_index_groups)
        self.channel_axis = channel_axis
        self.activation: Callable[[Array], Array] | None = _checked_activation(activation)

        def parameter(learned: bool, initializer: Initializer, metadata: Mapping[str, Any]) -> Any:
            if not learned:
                return nnx.data(None)
            values = initializer(rngs.params(), (self.num_features,), param_dtype)
            return nnx.Param(values, **metadata)

        # In flax's order, so that equal seeds give equal parameters.
        self.scale: nnx.Param[Array] | None = parameter(use_scale, scale_init, scale_metadata)
        self.bias: nnx.Param[Array] | None = parameter(use_bias, bias_init, bias_metadata)

    def __call__(
        self,
        x: Num[ArrayLike, "*shape"],
        *,
        mask: Bool[ArrayLike, "*broadcastable"] | None = None,
        scale: Num[ArrayLike, "*batch channels"] | None = None,
        bias: Num[ArrayLike, "*batch channels"] | None = None,
    ) -> Num[Array, "*shape"]:
        """Normalizes x.

        Args:
            x: The input; see `jgn.group_norm`.
            mask: True counts toward the moments.
            scale: Factors from elsewhere, (channels,) or (*batch, channels), as in adaptive group
                normalization; needs `use_scale=False`.
            bias: Offsets from elsewhere; needs `use_bias=False`.

        Returns:
            y, of x's shape.

        Raises:
            ValueError: x has not `num_features` channels; a scale or bias is given to a layer that
                learns its own; or as in `jgn.group_norm`.
            TypeError, NameError, NotImplementedError: as in `jgn.group_norm`.
        """
        x = as_numbers(x, "x")
        refuse_both("scale", self.scale is not None, scale)
        refuse_both("bias", self.bias is not None, bias)
        channels = x.shape[resolve_axes(x.ndim, self.channel_axis, self.reduction_axes).channel]
        if channels != self.num_features:
            raise ValueError(
                f"x must have num_features channels: got {channels} on axis {self.channel_axis} "
                f"of shape {x.shape} for num_features={self.num_features}; see channel_axis."
            )
        return group_norm(
            x,
            self.num_groups,
            scale if self.scale is None else self.scale[...],
            bias if self.bias is None else self.bias[...],
            epsilon=self.epsilon,
            channel_axis=self.channel_axis,
            reduction_axes=self.reduction_axes,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            activation=self.activation,
            dtype=self.dtype,
        )


def _checked_activation(activation: Any) -> Any:
    has_arrays = _has_arrays(activation)
    # The owner is no attribute of the layer: what is compiled would keep its first parameters.
    function = activation.func if isinstance(activation, functools.partial) else activation
    if isinstance(function, MethodType) and (
        isinstance(function.__self__, nnx.Module) or _has_arrays(function)
    ):
        raise TypeError(
            "activation must not be a method of a module or pytree: got "
            f"{function.__qualname__}; give the module itself, or call it on the result instead."
        )
    opaque = [leaf for leaf in jax.tree.leaves(activation) if isinstance(leaf, nnx.Module)]
    if opaque:
        raise TypeError(
            f"activation must be a pytree if it is a module: got {type(opaque[0]).__name__}, which "
            "is declared with pytree=False; call it on the result instead."
        )
    return nnx.data(as_pytree(activation)) if has_arrays else activation


def _has_arrays(activation: Any) -> bool:
    arrays, _ = split_activation(activation)
    return any(array is not None for array in arrays)


def _hashable(value: Any) -> Any:
    """nnx hashes a layer's attributes, and a list has no hash."""
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        return value
    return tuple(map(_hashable, value))
