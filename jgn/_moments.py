"""Shifted moments of every group: the mean and the variance of x around numbers k and q.

With d = x − k, every k and every q give the same moments,

    μ = k + m,    m = E[d],    σ² = (Σ(|d|² − q) − n · |m|²) / n + q,

and decide only how they are rounded: the relative error of σ² is about u · (1 + (k − μ)²/σ²),
u being the unit roundoff. Here k is the mean of at least one in `STRIDE` of the group's elements,
and the mean of s out of n numbers is never further from their mean than (k − μ)² ≤ (n/s) · σ²
(Cauchy-Schwarz). The textbook's E[x²] − E[x]² is the same with k = 0, and has no bound. (Chan,
Golub and LeVeque, Algorithms for Computing the Sample Variance, 1983: "shifted data".)

A sum that is taken term by term rounds in proportion to what it has reached. That of d, around 0,
never gets far; that of squares does, unless it has q near σ² to subtract from each of them. On one
CPU q is the variance of the sample, which is (n/s) · σ² at most, too; elsewhere, and under a mask,
whose sample is all that counts, it is 0.

A single element of the sample, if it is far from the rest, would take q to that bound. So on one
CPU the sample is larger for small groups, and for others in thirds: k is the middle one of their
means, and q the least of their variances, and what only one of the thirds contains moves neither
far. As one of the other means is at least as far from μ as k, on the same side, (k − μ)² is at most
(3/2) · (n/s) · σ² then. So no input whatever makes the error of σ² larger than
(1 + 5/2 · STRIDE) · u for each time that the sums round, unless σ is less than the last place of
μ, to which k is rounded, too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.ad_checkpoint import checkpoint_name

from jgn._axes import Axes
from jgn._devices import varying_as
from jgn._groups import Groups
from jgn._positions import Positions, by_components

# One position in so many decides k and q: 2 % of a pass over x, and an error of at most 161 u.
STRIDE = 64
# So many elements at least, whose mean is seldom further than σ/2 from μ.
SAMPLE = 32
# Of one position in so few no element alone makes the moments round much more. For small groups,
# which would take no more than one in so many, that costs less than thirds of several positions.
SHORT_STRIDE, LONG_STRIDE = 6, 16
# The share of E[x²] that E[x²] − E[x]² must be for its first digits not to be noise.
SIGNIFICANT = 1e-4
# m² is at most 3/2 · STRIDE · σ². So what is left of E[d²] − m², if fewer units in the last place
# of m² than this, is rounding.
ROUNDED = 512
# For a mean of fewer standard deviations from 0, a product of x rounds less than one of x − μ. For
# more, what Σ g·x and μ · Σ g have in common in the backward pass would cost digits.
NEAR_ZERO = 0.5

# The names of what autodiff can keep for the backward pass besides x, k and the parameters: either
# will do. From moments the way is shorter, but one array of sums is one kernel less on a GPU.
SUMS = "group_norm_sums"
MOMENTS = "group_norm_moments"


class Shards(NamedTuple):
    """The mapped axes, if any, over which groups extend."""

    axis_name: str | tuple[str, ...] | None
    axis_index_groups: tuple[tuple[int, ...], ...] | None

    def sum(self, value: Any) -> Any:
        if self.axis_name is None:
            return value
        return lax.psum(value, self.axis_name, axis_index_groups=self.axis_index_groups)

    def count(self, on_each: int) -> Any:
        """How many elements there are on all of them: a number, unless that differs."""
        # lax.psum multiplies a number by the size of the first group, for others as well.
        differs = len({len(group) for group in self.axis_index_groups or ()}) > 1
        return self.sum(jnp.asarray(on_each) if differs else on_each)


class Reduction(NamedTuple):
    """What makes up a group: its positions and channels, on all shards, where mask is True."""

    positions: Positions
    groups: Groups
    mask: Array | None
    shards: Shards

    def shifts(self, x: Array) -> tuple[Array, Array, Array]:
        """k and q of every group, and n: how many of its elements count, but at least 1."""
        if self.mask is not None:
            return self._shifts_of_all_that_counts(x)
        k, q = self._shifts_of_sample(x)
        n = jnp.asarray(self._number(self.positions), jnp.finfo(x.dtype).dtype)
        # XLA:CPU would multiply by the reciprocal of a number that it knows. A quotient it computes
        # once a group, a product for every position again.
        return k, q, lax.optimization_barrier(n) if self.positions.on_one_cpu else n

    def _shifts_of_all_that_counts(self, x: Array) -> tuple[Array, Array, Array]:
        counts = self._where_counted(jnp.ones_like(x))
        # To square them, too, would take as long as the moments do.
        sums = self._over_groups(self.positions.sums(self._where_counted(x), counts))
        total, number = self.positions.unpair(sums)
        n = jnp.maximum(number.real, 1)
        # XLA makes a product of a quotient by what it broadcasts.
        return _rounded(total / n.astype(x.dtype)), jnp.zeros_like(n), n

    def _shifts_of_sample(self, x: Array) -> tuple[Array, Array]:
        number = self.positions.number
        is_known = isinstance(number, int)  # Symbolic sizes may be small, and have no thirds.
        stride = (
            min(STRIDE, max(1, number * self.groups.size // SAMPLE)) if is_known else LONG_STRIDE
        )
        if self.positions.on_one_cpu:
            return self._shifts_on_one_cpu(x, stride)
        # A GPU sums in trees, which have no need of q; several CPUs do without it, as thirds of a
        # sample would travel between them. The last step is a sum, not a product, so that k needs
        # neither `_rounded` nor a kernel for it.
        sample = self.positions.sample(x, stride)
        positions = self._positions_of_sample(sample)
        k = self._over_groups(positions.sum(sample * self._inverse_number(positions, x)))
        return k, jnp.zeros_like(k.real)

    def _shifts_on_one_cpu(self, x: Array, stride: int) -> tuple[Array, Array]:
        """k and q, neither of which a single element of the sample decides."""
        thirds = None
        if stride > LONG_STRIDE:
            sample = self.positions.sample(x, stride, multiple_of=3)
            thirds = self.positions.in_thirds(sample)
        else:
            sample = self.positions.sample(x, min(stride, SHORT_STRIDE))
        if thirds is None:
            return self._mean_and_variance(self._positions_of_sample(sample), sample)
        axes, sample, axis = thirds
        positions = self._positions_of_sample(sample, axes)
        means, variances = self._mean_and_variance(positions, sample)
        k = by_components(lambda means: _median(*_unstacked(means, axis)), means)
        q = functools.reduce(lax.min, _unstacked(variances, axis))
        return self.groups.once_a_group(k), self.groups.once_a_group(q)

    def _positions_of_sample(self, sample: Array, axes: Axes | None = None) -> Positions:
        """Those of an array without a gradient, along the axes of x unless others are given."""
        return self.positions.of(sample, axes, few=self.groups.few_positions)

    def _mean_and_variance(self, positions: Positions, x: Array) -> tuple[Array, Array]:
        """Those of all of x in every group; 0 for a variance that would mostly be rounding."""
        inverse = self._inverse_number(positions, x)
        # Of an infinite square the product with a matrix would make a mean that is not a number.
        largest = jnp.finfo(x.dtype).max / 2
        squares = jnp.minimum(_squared_magnitude(x), largest).astype(x.dtype)
        pair = self._over_groups(positions.sums(x * inverse, squares * inverse))
        mean, mean_square = positions.unpair(pair)
        return mean, _significant_variance(mean, mean_square.real)

    def moments(self, x: Array, k: Array, q: Array, n: Array) -> tuple[Array, Array]:
        """m = E[d] of every group, and σ², or what rounding makes of 0."""
        along_k, along_q = map(self.positions.along, self.groups.spread_both(k, q))
        d = self._where_counted(x - along_k)
        shifted = self._where_counted((_squared_magnitude(d) - along_q).astype(d.dtype))
        sums = self._over_groups(self.positions.sums(d, shifted))
        sum_d, sum_shifted = self.positions.unpair(kept(sums, SUMS))
        m = kept(sum_d / n.astype(d.dtype), MOMENTS)
        # One quotient, so that backward there is one, too: the gradient of Σ(|d|² − q).
        variance = (sum_shifted.real - _rounded(n * _squared_magnitude(_rounded(m)))) / n + q
        return m, kept(variance, MOMENTS)

    def to_channels(self, u: Array, v: Array, x: Array) -> tuple[Array, Array]:
        """Gives every channel of x its group's u and v."""
        # Before they are spread: JAX would do so where they meet x, and for their gradient sum as
        # many values as x has over the devices.
        pair = varying_as(x, self.positions.pair(u, v))
        return self.positions.unpair(self.groups.spread(pair))

    def _where_counted(self, values: Array) -> Array:
        return values if self.mask is None else jnp.where(self.mask, values, 0)

    def _number(self, positions: Positions) -> Any:
        """How many elements every group has at these positions."""
        return self.shards.count(positions.number * self.groups.size)

    def _inverse_number(self, positions: Positions, x: Array) -> Array:
        return jnp.asarray(1 / self._number(positions), x.dtype)

    def _over_groups(self, per_channel: Array) -> Array:
        """Sums a value a channel over every group, on all shards."""
        return self.shards.sum(self.groups.sum(per_channel))


def kept(per_group: Array, name: str) -> Array:
    """Names it for `jax.checkpoint`; by components, as that fails on complex values."""
    return by_components(lambda real: checkpoint_name(real, name), per_group)


def is_constant(m: Array, variance: Array) -> Array:
    """Whether the elements of a group are equal, so that its variance is only rounding."""
    eps = jnp.finfo(variance.dtype).eps
    return variance <= ROUNDED * eps * _squared_magnitude(m)


# Of `jax.lax` where it says the same: JAX traces a function of `jax.numpy` as a program of its own.
def zero_where(condition: Array, x: Array) -> Array:
    """Sets values to 0, and leaves their derivatives."""
    return x - lax.stop_gradient(lax.select(condition, x, jnp.zeros_like(x)))


def _unstacked(x: Array, axis: int) -> list[Array]:
    return [lax.index_in_dim(x, i, axis, keepdims=False) for i in range(x.shape[axis])]


def _median(a: Array, b: Array, c: Array) -> Array:
    return lax.max(lax.min(a, b), lax.min(lax.max(a, b), c))


def _significant_variance(mean: Array, mean_square: Array) -> Array:
    """E[|x|²] − |E[x]|² where that has digits that are not noise, else 0."""
    variance = mean_square - _rounded(_squared_magnitude(mean))
    return lax.select(variance > SIGNIFICANT * mean_square, variance, jnp.zeros_like(variance))


def mean(k: Array, m: Array, variance: Array) -> tuple[Array, Array]:
    """μ in two parts: a pivot, without a gradient, and what is left of μ.

    The pivot is μ, rounded: x minus it is exact for x near μ, and 0 for x equal to it. For μ near 0
    it is 0: then x minus it is exact for all x.
    """
    nearest = lax.stop_gradient(k + _rounded(m))
    near_zero = _squared_magnitude(nearest) < NEAR_ZERO**2 * variance
    pivot = lax.select(near_zero, jnp.zeros_like(nearest), nearest)
    return pivot, m - (pivot - k)


def _rounded(x: Array) -> Array:
    """Rounds x, wherever it is computed, and x's cotangent, in the same way.

    Of several loops that compute a product (or a quotient, of which XLA may make one) and a sum
    that follows, XLA:CPU may contract the two in one, but not in another: where x has two uses, μ
    would be off by an ulp where it must cancel, and a sample's result would depend on how many
    there are in the batch.
    """
    if jax.config.jax_disable_jit:
        return x  # Nothing is contracted then; ONNX's converters know no clamp of symbolic sizes.
    limits = jnp.finfo(x.dtype)
    return by_components(lambda real: lax.clamp(limits.min, real, limits.max), x)


def _squared_magnitude(d: Array) -> Array:
    if jnp.iscomplexobj(d):
        return lax.square(d.real) + lax.square(d.imag)
    return lax.square(d)
