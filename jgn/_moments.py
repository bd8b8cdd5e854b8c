"""Shifted moments of every group: the mean and the variance of x around a pivot k.

With d = x − k, every k gives the same moments,

    μ = k + m,    m = E[d],    σ² = E[|d|²] − |m|²,

and decides only how they are rounded: the relative error of σ² is about u · (1 + (k − μ)²/σ²),
u being the unit roundoff. Here k is the mean of at least one in `STRIDE` of the group's elements,
and the mean of s out of n numbers is never further from their mean than (k − μ)² ≤ (n/s) · σ²
(Cauchy-Schwarz). So no input whatever makes that error larger than (1 + STRIDE) · u. The textbook's
E[x²] − E[x]² is the same with k = 0, and has no bound.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jgn._groups import EVERY, Groups

# One position in so many decides the pivot: 2 % of a pass over x, and an error of at most 65 u.
STRIDE = 64

# The name of what autodiff keeps for the backward pass besides x: a few numbers a group.
RESIDUAL = "group_norm_moments"


class Moments(NamedTuple):
    """The pivot k of every channel, and m = E[x − k] and σ² of every group."""

    pivot: Array
    mean: Array
    variance: Array


class Shards(NamedTuple):
    """The mapped axes, if any, over which groups extend."""

    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None

    def sum(self, values: tuple[Array, ...]) -> tuple[Array, ...]:
        if self.axis_name is None:
            return values
        return lax.psum(values, self.axis_name, axis_index_groups=self.axis_index_groups)

    def max(self, value: Array) -> Array:
        if self.axis_name is None:
            return value
        return lax.pmax(value, self.axis_name, axis_index_groups=self.axis_index_groups)


def moments(x: Array, groups: Groups, mask: Array | None, shards: Shards) -> Moments:
    """Moments of every group of x, over all shards, counting the elements where mask is True."""
    # The identity holds for every k, so stopping its gradient changes no derivative of any order.
    k = _kept(_pivot(lax.stop_gradient(x), groups, mask, shards))
    k = groups.spread(k)
    # Equal differences x − k become one array in memory as soon as several passes read them. Copies
    # behind a barrier count as different, so that each pass subtracts its own on the way.
    k_of_mean, k_of_variance, k_of_output = lax.optimization_barrier((k, k, k))
    n, sum_d, sum_d2 = shards.sum(
        (
            groups.count(x, mask),
            groups.sum(_where(mask, x - k_of_mean, 0)),
            groups.sum(_where(mask, _squared_magnitude(x - k_of_variance), 0)),
        )
    )
    n = jnp.maximum(n, 1)
    mean = _kept(sum_d / n.astype(x.dtype))
    mean_square = _kept(sum_d2 / n)
    variance = mean_square - _squared_magnitude(mean)
    # Rounding can put σ² = 0 just below 0. A maximum would halve the derivative at exactly 0.
    return Moments(k_of_output, mean, jnp.where(variance < 0, 0, variance))


def _pivot(x: Array, groups: Groups, mask: Array | None, shards: Shards) -> Array:
    """The mean of a sample of every group, or of all that the mask counts: one value a group.

    It is taken around one of the elements, which makes it exact where all are equal: in a constant
    group d = 0.
    """
    if mask is None:
        x = groups.sample(x, one_in=STRIDE)
        candidates = groups.sample(x, one_in=EVERY)
    else:
        candidates = _where(mask, x, -jnp.inf)
    n = groups.count(x, mask)
    anchor = jnp.where(n == 0, 0, _by_parts(groups.max, candidates))
    sum_d = groups.sum(_where(mask, x - groups.spread(anchor), 0))
    k = anchor + sum_d / jnp.maximum(n, 1).astype(x.dtype)

    def one_for_all_shards(part: Array) -> Array:
        chosen = shards.max(jnp.where(n == 0, -jnp.inf, part))
        return jnp.where(chosen == -jnp.inf, 0, chosen)

    return k if shards.axis_name is None else _by_parts(one_for_all_shards, k)


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
