"""Shifted moments of every group: the mean and the variance of x around a pivot k.

With d = x − k, every k gives the same moments,

    μ = k + m,    m = E[d],    σ² = E[|d|²] − |m|²,

and decides only how they are rounded: the relative error of σ² is about u · (1 + (k − μ)²/σ²),
u being the unit roundoff. Here k is the mean of at least one in `STRIDE` of the group's elements,
and the mean of s out of n numbers is never further from their mean than (k − μ)² ≤ (n/s) · σ²
(Cauchy-Schwarz). So no input whatever makes that error larger than (1 + STRIDE) · u for each time
that the sums round. The textbook's E[x²] − E[x]² is the same with k = 0, and has no bound.

The output is taken around another pivot, μ as exactly as its dtype has it. In a group of equal
elements that is their value, whatever the sums that led there have rounded, and x − pivot = 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jgn._groups import Groups
from jgn._positions import Positions

# One position in so many decides the pivot: 2 % of a pass over x, and an error of at most 65 u.
STRIDE = 64

# The name of what autodiff keeps for the backward pass besides x: a few numbers a group.
RESIDUAL = "group_norm_moments"


class Moments(NamedTuple):
    """μ, in two parts, of every channel's group, and σ² of every group."""

    pivot: Array  # μ rounded
    mean: Array  # E[x − pivot], what rounding left of μ
    variance: Array  # still to be spread to the channels


class Shards(NamedTuple):
    """The mapped axes, if any, over which groups extend."""

    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None

    def sum(self, values: tuple[Array, ...]) -> tuple[Array, ...]:
        if self.axis_name is None:
            return values
        return lax.psum(values, self.axis_name, axis_index_groups=self.axis_index_groups)


def moments(
    x: Array, positions: Positions, groups: Groups, mask: Array | None, shards: Shards
) -> Moments:
    """Moments of every group of x, over all shards, counting the elements where mask is True."""
    # The identity holds for every k, so stopping its gradient changes no derivative of any order.
    sample = lax.stop_gradient(x if mask is not None else positions.sample(x, STRIDE))
    count, total = shards.sum(
        (groups.count(sample, mask), groups.sum(positions.sum(_where(mask, sample, 0))))
    )
    k = groups.spread(_kept(total / jnp.maximum(count, 1).astype(x.dtype)))

    d = x - k
    sum_d, sum_d2 = positions.sums(_where(mask, d, 0), _where(mask, _squared_magnitude(d), 0))
    count, sum_d, sum_d2 = shards.sum(
        (groups.count(x, mask), groups.sum(sum_d), groups.sum(sum_d2))
    )
    n = jnp.maximum(count, 1)
    sum_d, mean_square = _kept(sum_d), _kept(sum_d2 / n)
    variance = mean_square - _squared_magnitude(sum_d / n.astype(x.dtype))
    # Rounding can put σ² = 0 just below. A maximum would halve the derivative at exactly 0.
    variance = jnp.where(variance < 0, 0, variance)

    n = n.astype(x.dtype)
    n, sum_d = n if mask is None else groups.spread(n), groups.spread(sum_d)
    pivot = lax.stop_gradient(k + sum_d / n)
    return Moments(pivot, (sum_d - n * (pivot - k)) / n, variance)


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
