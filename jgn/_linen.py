"""The flax.linen layer."""

from collections.abc import Callable, Collection, Sequence

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Dtype, Initializer
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Num

from jgn._axes import channels_of_x, num_groups_from, resolve_axes
from jgn._group_norm import as_numbers, group_norm


class GroupNorm(nn.Module):
    """Group normalization layer; see `jgn.group_norm` for the equation and for what x may be.

    Its parameters are `scale` and `bias`, shape (channels,), as those of `flax.linen.GroupNorm`,
    whose checkpoints it loads. Note that flax's epsilon is 1e-6 by default, and that the output has
    x's dtype.

    Attributes:
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
        activation: An elementwise function applied to the result, such as `nn.silu`. A module of
            flax.linen has no place here; call it on the result. Arrays of one are constants. What a
            function refers to is read when a call is traced.

    Example:
        >>> import flax.linen as nn, jax, jgn
        >>> layer = jgn.GroupNorm(num_groups=8, activation=nn.silu)
        >>> x = jax.random.normal(jax.random.key(0), (2, 16, 16, 64))
        >>> y, variables = layer.init_with_output(jax.random.key(1), x)
        >>> jax.tree.map(jax.numpy.shape, variables)
        {'params': {'bias': (64,), 'scale': (64,)}}
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: float = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = nn.initializers.zeros
    scale_init: Initializer = nn.initializers.ones
    reduction_axes: int | Collection[int] | None = None
    axis_name: str | Sequence[str] | None = None
    axis_index_groups: Sequence[Sequence[int]] | None = None
    channel_axis: int = -1
    activation: Callable[[Array], Array] | None = None

    @nn.compact
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
            ValueError: the groups are given by both count and size or by neither; a scale or bias
                is given to a layer that learns its own; or as in `jgn.group_norm`.
            TypeError, NameError, NotImplementedError: as in `jgn.group_norm`.
            flax.errors.ScopeParamShapeError: x has other channels than the parameters.
        """
        x = as_numbers(x, "x")
        axes = resolve_axes(x.ndim, self.channel_axis, self.reduction_axes)
        channels = x.shape[axes.channel]
        num_groups = num_groups_from(
            self.num_groups, self.group_size, channels, hint=channels_of_x(x.shape, axes)
        )

        # Not a method, which flax would list among the calls of the layer.
        def learned_or_given(
            name: str, learned: bool, init: Initializer, given: ArrayLike | None
        ) -> ArrayLike | None:
            refuse_both(name, learned, given)
            return self.param(name, init, (channels,), self.param_dtype) if learned else given

        return group_norm(
            x,
            num_groups,
            learned_or_given("scale", self.use_scale, self.scale_init, scale),
            learned_or_given("bias", self.use_bias, self.bias_init, bias),
            epsilon=self.epsilon,
            channel_axis=self.channel_axis,
            reduction_axes=self.reduction_axes,
            mask=mask,
            axis_name=self.axis_name,
            axis_index_groups=self.axis_index_groups,
            activation=self.activation,
            dtype=self.dtype,
        )


def refuse_both(name: str, learned: bool, given: ArrayLike | None) -> None:
    """Raises ValueError if a layer that learns its scale or bias is also given one."""
    if learned and given is not None:
        raise ValueError(
            f"{name} must come from the layer or from the call, not both: got {name} in the call "
            f"of a layer with use_{name}=True; write GroupNorm(..., use_{name}=False)."
        )
