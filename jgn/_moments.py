"""Shifted moments of every group: the mean and the variance of x around a pivot k.

With d = x − k, every k gives the same moments,

    μ = k + m,    m = E[d],    σ² = E[|d|²] − |m|²,

and decides only how they are rounded: the relative error of σ² is about u · (1 + (k − μ)²/σ²),
u being the unit roundoff. Here k is the mean of at least one in `STRIDE` of the group's elements,
and the mean of s out of n numbers is never further from their mean than (k − μ)² ≤ (n/s) · σ²
(Cauchy-Schwarz). So no input whatever makes that error larger than (1 + STRIDE) · u. The textbook's
E[x²] − E[x]² is the same with k = 0, and has no bound.

The output is taken around another pivot, μ as exactly as its dtype has it. In a group of equal
elements that is their value, whatever the sums that led there have rounded, and x − μ = 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jgn._groups import Groups

# One position in so many decides the pivot: 2 % of a pass over x, and an error of at most 65 u.
STRIDE = 64

# The name of what autodiff keeps for the backward pass besides x: a few numbers a group.
RESIDUAL = "group_norm_moments"


class Moments(NamedTuple):
    """Of every group μ, in two parts, and σ²."""

    pivot: Array  # μ rounded, one value a channel
    mean: Array  # E[x − pivot], what rounding left of μ
    variance: Array


class Shards(NamedTuple):
    """The mapped axes, if any, over which groups extend."""

    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None

    def sum(self, values: tuple[Array, ...]) -> tuple[Array, ...]:
        if self.axis_name is None:
            return values
        return lax.psum(values, self.axis_name, axis_index_groups=self.axis_index_groups)


def moments(x: Array, groups: Groups, mask: Array | None, shards: Shards) -> Moments:
    """Moments of every group of x, over all shards, counting the elements where mask is True."""
    # The identity holds for every k, so stopping its gradient changes no derivative of any order.
    k = _kept(_mean_of_sample(lax.stop_gradient(x), groups, mask, shards))
    # Equal differences x − k become one array in memory as soon as several passes read them. Copies
    # behind a barrier count as different, so that each pass subtracts its own on the way.
    k_of_mean, k_of_variance = lax.optimization_barrier((groups.spread(k), groups.spread(k)))
    count, sum_d, sum_d2 = shards.sum(
        (
            groups.count(x, mask),
            groups.sum(_where(mask, x - k_of_mean, 0)),
            groups.sum(_where(mask, _squared_magnitude(x - k_of_variance), 0)),
        )
    )
    n = jnp.maximum(count, 1)
    sum_d = _kept(sum_d)
    mean_square = _kept(sum_d2 / n)
    mean = sum_d / n.astype(x.dtype)
    variance = mean_square - _squared_magnitude(mean)
    step = lax.stop_gradient((k + mean) - k)
    return Moments(
        pivot=groups.spread(k + step),
        mean=(sum_d - n.astype(x.dtype) * step) / n.astype(x.dtype),
        # Rounding can put σ² = 0 just below. A maximum would halve the derivative at exactly 0.
        variance=jnp.where(variance < 0, 0, variance),
    )


def _mean_of_sample(x: Array, groups: Groups, mask: Array | None, shards: Shards) -> Array:
    """The mean of a sample of every group, or of all that the mask counts: one value a group."""
    if mask is None:
        x = groups.sample(x, one_in=STRIDE)
    count, total = shards.sum((groups.count(x, mask), groups.sum(_where(mask, x, 0))))
    return total / jnp.maximum(count, 1).astype(x.dtype)


def _kept(per_group: Array) -> Array:
    # By parts, as jax.checkpoint fails on complex values that it is to keep.
    return _by_parts(lambda part: checkpoint_name(part, RESIDUAL), per_group)


def _where(mask: Array | None, values: Array, otherwise: float) -> Array:
    return values if mask is None else jnp.where(mask, values, otherwise)


def _squared_magnitude(d: Array) -> Array:
    if jnp.iscomplexobj(d):
        return jnp.square(d.real) + jnp.square(d.imag)
    return jnp.square(d)


def _by_parts(function: Callable[[Array], Array], x: Array) -> Array:
    """Applies a function of real arrays to the real and the imaginary part of x."""
    if jnp.iscomplexobj(x):
        return lax.complex(function(x.real), function(x.imag))
    return function(x)
