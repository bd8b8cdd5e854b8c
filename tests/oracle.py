"""The oracle: group normalization in NumPy, in float64 at least, written from its equation.

With μ and σ² over the n counted elements of one sample's one group,

    y = scale · (x − μ) / √(σ² + ε) + bias

The derivatives are those of the loss L = Re Σ cotangent · y, worked out by hand. With
r = 1/√(σ² + ε), d = x − μ, a = scale · cotangent, S = Re Σ a·d, and w = 1 where an element counts,

    ∂L/∂x     = r · (a − w·Σa/n) − w · S · r³ · conj(d)/n
    ∂L/∂scale = Σ cotangent · r · d      over all that share one scale
    ∂L/∂bias  = Σ cotangent              over all that share one bias

and for real x, in the direction v, with e = v − Σwv/n, c = Σwdv/n and S' = Σ a·e,

    ∂²L/∂x² · v = −r³ · (c · (a − w·Σa/n) + w · (S'·d + S·e − 3·r²·c·S·d)/n)
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Gradients(NamedTuple):
    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


class Oracle:
    """One call's y, its gradients and its Hessian-vector products."""

    def __init__(
        self,
        x,
        num_groups,
        scale=None,
        bias=None,
        *,
        epsilon=1e-5,
        channel_axis=-1,
        reduction_axes=None,
        mask=None,
    ):
        x = wide(x)
        channel = channel_axis % x.ndim
        if reduction_axes is None:
            reduction_axes = [*range(1, x.ndim), channel]
        reduced = {axis % x.ndim for axis in np.atleast_1d(reduction_axes)}
        batch = [axis for axis in range(x.ndim) if axis not in reduced]
        spatial = [axis for axis in range(x.ndim) if axis in reduced and axis != channel]
        self._order = [*batch, channel, *spatial]
        self._batch_rank, self._spatial_rank = len(batch), len(spatial)
        self._ordered_shape = tuple(x.shape[axis] for axis in self._order)
        self._grouped_shape = (math.prod(x.shape[axis] for axis in batch), num_groups, -1)

        channels = x.shape[channel]
        self._scale = np.ones(channels) if scale is None else wide(scale)
        bias = np.zeros(channels) if bias is None else wide(bias)
        self._bias_rank = bias.ndim
        self._counted = self._split(np.broadcast_to(True if mask is None else mask, x.shape))
        self._n = np.maximum(self._counted.sum(-1, keepdims=True), 1)

        x = self._split(x)
        self.mean = self._mean(x)
        self._d = x - self.mean
        self.variance = self._mean(np.abs(self._d) ** 2)
        total = self.variance + epsilon
        # Without variance or epsilon a group is all bias.
        self._r = np.where(total == 0, 0, 1 / np.sqrt(np.where(total == 0, 1, total)))
        self.inverse_deviation = self._join(np.broadcast_to(self._r, x.shape))
        self.y = self._join(self._laid_out(self._scale) * self._d * self._r + self._laid_out(bias))

    def gradients(self, cotangent):
        g = self._split(wide(cotangent))
        a, s = self._a_and_s(g)
        w, d, r, n = self._counted, self._d, self._r, self._n
        x = r * (a - w * a.sum(-1, keepdims=True) / n) - w * s * r**3 * np.conj(d) / n
        return Gradients(
            self._join(x),
            self._shared(g * r * d, self._scale.ndim),
            self._shared(g, self._bias_rank),
        )

    def hessian_vector_product(self, cotangent, direction):
        a, s = self._a_and_s(self._split(wide(cotangent)))
        w, d, r, n = self._counted, self._d, self._r, self._n
        v = self._split(wide(direction))
        e, c = v - self._mean(v), self._mean(d * v)
        s_along_v = (a * e).sum(-1, keepdims=True)
        centred = a - w * a.sum(-1, keepdims=True) / n
        return self._join(
            -(r**3) * (c * centred + w * (s_along_v * d + s * e - 3 * r**2 * c * s * d) / n)
        )

    def gradient_terms(self, cotangent):
        """The size of the terms that cancel in the gradient of x: what its rounding grows with.

        For every element that of its own group.
        """
        a, _ = self._a_and_s(self._split(wide(cotangent)))
        return self.largest(self._join(self._r * a))

    def largest(self, values):
        """For every element the largest magnitude of these values in its own group."""
        largest = np.abs(self._split(wide(values))).max(-1, keepdims=True)
        return self._join(np.broadcast_to(largest, self._d.shape))

    def _a_and_s(self, g):
        a = self._laid_out(self._scale) * g
        return a, (a * self._d).sum(-1, keepdims=True).real

    def _mean(self, values):
        return np.where(self._counted, values, 0).sum(-1, keepdims=True) / self._n

    def _split(self, values):
        """From x's shape to (samples, groups, elements)."""
        return values.transpose(self._order).reshape(self._grouped_shape)

    def _join(self, grouped):
        return grouped.reshape(self._ordered_shape).transpose(np.argsort(self._order))

    def _laid_out(self, values):
        """From (channels,) or (*batch, channels) to (samples, groups, elements)."""
        ordered = values.reshape(values.shape + (1,) * self._spatial_rank)
        return np.broadcast_to(ordered, self._ordered_shape).reshape(self._grouped_shape)

    def _shared(self, grouped, rank):
        """Sums (samples, groups, elements) to (channels,), rank 1, or to (*batch, channels)."""
        ordered = grouped.reshape(self._ordered_shape)
        positions = ordered.sum(tuple(range(self._batch_rank + 1, ordered.ndim)))
        return positions if rank > 1 else positions.sum(tuple(range(self._batch_rank)))


def unit_roundoff(dtype):
    """The largest relative error of one rounding to this dtype."""
    return float(jnp.finfo(dtype).eps) / 2


def moment_roundoff(dtype):
    """The same for the dtype in which moments are computed: float32 at least."""
    return min(unit_roundoff(dtype), unit_roundoff(jnp.float32))


def tolerance(dtype, elements):
    """The relative error of sums over so many elements, and of the ten roundings around them.

    The roundings of a sum do not conspire: √elements of them is what adds up.
    """
    return (10 + math.sqrt(elements)) * moment_roundoff(dtype)


def promised(dtype, elements):
    """The relative error of an output, and of a gradient of x: in float32 1e-6 of any group."""
    return min(tolerance(dtype, elements), 1e-6)


def wide(values):
    """To more digits than they have: float64, or from that to what NumPy has beyond it."""
    values = np.asarray(values)
    if values.dtype in (np.float64, np.complex128):
        return values.astype(np.clongdouble if np.iscomplexobj(values) else np.longdouble)
    return values.astype(np.complex128 if np.iscomplexobj(values) else np.float64)
