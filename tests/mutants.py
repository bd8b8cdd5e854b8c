"""Tries the tests: python tests/mutants.py breaks the source in many ways, one at a time.

A mutant is killed when the tests that should notice it fail. Those of a general mutation tool, a
`+` for a `-` at every place, are mostly noticed by anything that calls the function at all; these
are the mistakes that people make in group normalization. First the tests must pass without any:
what is compiled then serves for all that a mistake does not change. On two cores it takes an hour.
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]


class Mutant(NamedTuple):
    """A mistake: what stands in a file of the package, and what stands there instead."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]


VARIANCE = "(sum_shifted.real - _rounded(n * _squared_magnitude(_rounded(m)))) / n + q"
CLAMPED = "zero_where(constant, measured)"
SHARED = "        sums = self._over_groups(self.positions.sums(d, shifted))\n"

MUTANTS = (
    # The equation
    Mutant(
        "another epsilon",
        "_group_norm.py",
        "_inverse_sqrt(sigma_squared + epsilon)",
        "_inverse_sqrt(sigma_squared + 1.001 * epsilon)",
        ("values", "tutorials"),
    ),
    Mutant(
        "epsilon beside the standard deviation",
        "_group_norm.py",
        "_inverse_sqrt(sigma_squared + epsilon)",
        "1 / (jnp.sqrt(sigma_squared) + epsilon)",
        ("values", "tutorials"),
    ),
    Mutant(
        "unbiased variance",
        "_group_norm.py",
        "_inverse_sqrt(sigma_squared + epsilon)",
        "_inverse_sqrt(sigma_squared * n / jnp.maximum(n - 1, 1) + epsilon)",
        ("values", "tutorials"),
    ),
    Mutant(
        "the mean's square forgotten",
        "_moments.py",
        VARIANCE,
        "sum_shifted.real / n + q",
        ("values",),
    ),
    Mutant(
        "interleaved groups",
        "_groups.py",
        "per_channel.reshape(*groups, *self._lane_shape)",
        "jnp.moveaxis(per_channel.reshape(*per_channel.shape[:-1], *self._lane_shape, "
        "self._num_groups), -1, -4)",
        ("values", "groups"),
    ),
    Mutant(
        "groups spread to the wrong channels",
        "_groups.py",
        "grouped.reshape(*per_group.shape[:-1], self._num_groups * self.size)",
        "grouped.swapaxes(-1, -2).reshape(*per_group.shape[:-1], self._num_groups * self.size)",
        ("groups", "values"),
    ),
    Mutant(
        "scale before normalization only",
        "_group_norm.py",
        "b = -rest * a",
        "b = -rest",
        ("values",),
    ),
    Mutant(
        "no bias",
        "_group_norm.py",
        "    b = b if bias is None else b + bias\n",
        "    b = b if bias is None else b + 0 * bias\n",
        ("values",),
    ),
    Mutant(
        "values of channels along the wrong axes",
        "_positions.py",
        "jnp.transpose(values, sorted(range(len(owners)), key=owners.__getitem__))",
        "values",
        ("values",),
    ),
    Mutant(
        "|d|² without the imaginary part",
        "_moments.py",
        "return lax.square(d.real) + lax.square(d.imag)",
        "return lax.square(d.real)",
        ("values",),
    ),
    # Axes
    Mutant(
        "batch normalized along with space",
        "_axes.py",
        "if axis > 0 or axis == channel]",
        "if axis >= 0]",
        ("values",),
    ),
    Mutant(
        "a wrong axis reduced",
        "_axes.py",
        "if axis > 0 or axis == channel]",
        "if axis > 1 or axis == channel]",
        ("values",),
    ),
    Mutant(
        "channels always last",
        "_axes.py",
        "    return index % rank\n",
        "    return rank - 1 if name == 'channel_axis' else index % rank\n",
        ("values",),
    ),
    # Rounding
    Mutant(
        "no shift",
        "_moments.py",
        "return self.groups.once_a_group(k), ",
        "return self.groups.once_a_group(0 * k), ",
        ("values",),
    ),
    Mutant(
        "no shift on other devices than a CPU",
        "_moments.py",
        "sum(sample * self._inverse_number(positions, x))",
        "sum(sample * 0)",
        ("values",),
    ),
    Mutant(
        "no shift of the squares",
        "_moments.py",
        "lax.select(variance > SIGNIFICANT * mean_square, variance, jnp.zeros_like(variance))",
        "jnp.zeros_like(variance)",
        ("groups",),
    ),
    Mutant(
        "noise for a shift of the squares",
        "_moments.py",
        "SIGNIFICANT = 1e-4\n",
        "SIGNIFICANT = -1\n",
        ("groups",),
    ),
    Mutant(
        "the shift of the squares not added to the variance",
        "_moments.py",
        VARIANCE,
        "(sum_shifted.real - n * _squared_magnitude(m)) / n",
        ("values",),
    ),
    Mutant(
        "a pivot beside 0",
        "_moments.py",
        "lax.select(near_zero, jnp.zeros_like(nearest), nearest)",
        "nearest",
        ("groups",),
    ),
    Mutant(
        "no pivot",
        "_moments.py",
        "lax.select(near_zero, jnp.zeros_like(nearest), nearest)",
        "jnp.zeros_like(nearest)",
        ("values",),
    ),
    Mutant(
        "no shift of the squares where the channels have it by a product",
        "_groups.py",
        "        return both.real, both.imag\n",
        "        return both.real, jnp.zeros_like(both.imag)\n",
        ("groups", "values"),
    ),
    Mutant(
        "k and q by a product each",
        "_groups.py",
        "if not self._multiplies or jnp.iscomplexobj(u):",
        "if True:",
        ("structure",),
    ),
    Mutant(
        "values of groups computed for every position",
        "_groups.py",
        "        return per_group / lax.clamp(ones, lax.stop_gradient(per_group), ones)\n",
        "        return per_group\n",
        ("structure",),
    ),
    Mutant(
        "a few positions of the sample summed in a loop of their own",
        "_moments.py",
        "few=self.groups.few_positions)",
        "few=1)",
        ("structure",),
    ),
    Mutant(
        "positions added along with channels that are not added lane by lane",
        "_groups.py",
        "LARGEST_BLOCK * LANES // self.size) if has_lanes else 1",
        "LARGEST_BLOCK * LANES // self.size)",
        ("structure",),
    ),
    Mutant(
        "one of a few positions forgotten",
        "_blocks.py",
        "lax.split(x, [1] * x.shape[axis], axis))",
        "lax.split(x, [1] * x.shape[axis], axis)[-2:])",
        ("groups",),
    ),
    Mutant(
        "positions added one by one though nobody knows how many",
        "_blocks.py",
        "self._few = few if isinstance(self.number, int) else 1",
        "self._few = few",
        ("transformations",),
    ),
    Mutant(
        "positions added one by one where that has a gradient",
        "_blocks.py",
        "axes: Axes, few: int = 1):",
        "axes: Axes, few: int = 5):",
        ("structure",),
    ),
    Mutant(
        "the mean of the sample for the middle mean of its thirds",
        "_moments.py",
        "_median(*_unstacked(means, axis))",
        "sum(_unstacked(means, axis)) / 3",
        ("groups", "values"),
    ),
    Mutant(
        "the largest variance of the thirds",
        "_moments.py",
        "functools.reduce(lax.min, ",
        "functools.reduce(lax.max, ",
        ("groups", "values"),
    ),
    Mutant(
        "a sample that has no thirds",
        "_moments.py",
        "stride, multiple_of=3)",
        "stride)",
        ("groups", "values"),
    ),
    Mutant(
        "no larger sample of small groups",
        "_moments.py",
        "min(stride, SHORT_STRIDE)",
        "stride",
        ("values",),
    ),
    Mutant(
        "fewer samples than one in 64 where strides do not divide sizes",
        "_sample.py",
        "one_in * len(share[taken.of_each]) // len(share)",
        "one_in // taken.of_each.step",
        ("sample",),
    ),
    Mutant(
        "x by itself for means of up to two deviations",
        "_moments.py",
        "NEAR_ZERO = 0.5",
        "NEAR_ZERO = 2",
        ("values",),
    ),
    Mutant(
        "one position as the sample",
        "_moments.py",
        "STRIDE = 64\n",
        "STRIDE = 2**30\n",
        ("values", "groups"),
    ),
    Mutant(
        "one element as the sample of a small group",
        "_moments.py",
        "SAMPLE = 32\n",
        "SAMPLE = 1\n",
        ("groups",),
    ),
    Mutant(
        "a sample from the borders",
        "_sample.py",
        "start = (size - 1 - (number - 1) * stride) // 2",
        "start = 0",
        ("sample",),
    ),
    Mutant(
        "a sample from as few rows as possible",
        "_sample.py",
        "LATER_STRIDE = 6\n",
        "LATER_STRIDE = 1\n",
        ("sample",),
    ),
    Mutant(
        "a sample from as few planes as possible",
        "_sample.py",
        "in sides[axis + 1 : last + 1]",
        "in sides[max(axis + 1, last) : last + 1]",
        ("sample",),
    ),
    Mutant(
        "a sample of one phase of a pattern",
        "_sample.py",
        "key=misses",
        "key=lambda s: abs(s - stride)",
        ("sample",),
    ),
    Mutant(
        "a sample from a single row or column of several",
        "_sample.py",
        "ENOUGH_FOR_TWO = 5\n",
        "ENOUGH_FOR_TWO = 2**30\n",
        ("sample", "values"),
    ),
    Mutant(
        "a sample that leaves out devices",
        "_sample.py",
        "shares = side.parts // halves",
        "halves = side.parts\n    shares = 1",
        ("sample",),
    ),
    Mutant(
        "more of the sample from one device than from the other that has half a share",
        "_sample.py",
        "_centered(part * halves, one_in, halves, is_shared=True)",
        "_centered(part * halves, one_in, 1, is_shared=True)",
        ("sample",),
    ),
    Mutant(
        "in all shares the same phase of a pattern",
        "_sample.py",
        "is_shared and math.gcd(stride, size) > 1",
        "False",
        ("sample",),
    ),
    Mutant(
        "shares where not all splits are some of them",
        "_sample.py",
        "if side.splits & (side.splits - 1):",
        "if False:",
        ("sharding",),
    ),
    Mutant(
        "a sample from the borders of every part",
        "_sample.py",
        "start = stride // 3 or stride // 2",
        "start = 0",
        ("sample",),
    ),
    Mutant(
        "a single position from the middle of what devices share",
        "_sample.py",
        "slice(part // 2, part // 2 + 1, 1)",
        "slice(side.positions // 2, side.positions // 2 + 1, 1)",
        ("sample",),
    ),
    Mutant(
        "a single position of an axis that is known to be split",
        "_sample.py",
        "if side.partitions == 1 and side.positions < ",
        "if side.positions < ",
        ("sample",),
    ),
    Mutant(
        "all of a few positions that devices may share",
        "_sample.py",
        "min(ENOUGH_FOR_TWO, one_in + 1)",
        "min(2, one_in + 1)",
        ("sample",),
    ),
    Mutant(
        "a sample from the middle of an axis",
        "_sample.py",
        "smallest = 1 if is_shared else 5",
        "smallest = 1",
        ("sample",),
    ),
    Mutant(
        "as many shares as there are devices, however many",
        "_sample.py",
        "MOST_PARTS = 8\n",
        "MOST_PARTS = 2**30\n",
        ("sample",),
    ),
    Mutant(
        "a slice of a symbolic size that is known to be split",
        "_sample.py",
        "if side.partitions == 1 else 1",
        "if side.partitions else 1",
        ("sharding",),
    ),
    Mutant(
        "symbolic sizes that cannot be 0",
        "_sample.py",
        "min_dim(size, ",
        "min_dim(size - 1, ",
        ("transformations",),
    ),
    Mutant(
        "symbolic sizes sampled from the first position on",
        "_sample.py",
        "min_dim(size, (size - 1) % stride // 2)",
        "0",
        ("sample",),
    ),
    Mutant(
        "of symbolic sizes one position in 64",
        "_moments.py",
        "if is_known else LONG_STRIDE",
        "if is_known else STRIDE",
        ("values",),
    ),
    Mutant(
        "the output around the sample's mean",
        "_moments.py",
        "nearest = lax.stop_gradient(k + _rounded(m))",
        "nearest = k",
        ("values",),
    ),
    Mutant(
        "the pivot's two uses rounded as each loop likes",
        "_moments.py",
        "nearest = lax.stop_gradient(k + _rounded(m))",
        "nearest = lax.stop_gradient(k + m)",
        ("sharding",),
    ),
    Mutant(
        "a masked mean rounded as each loop likes",
        "_moments.py",
        "_rounded(total / n.astype(x.dtype))",
        "total / n.astype(x.dtype)",
        ("sharding",),
    ),
    Mutant(
        "numbers near the mean rounded as each loop likes",
        "_moments.py",
        "lambda real: lax.clamp(limits.min, real, limits.max)",
        "lambda real: real",
        ("structure",),
    ),
    Mutant(
        "the sample's variance rounded as each loop likes",
        "_moments.py",
        "mean_square - _rounded(_squared_magnitude(mean))",
        "mean_square - _squared_magnitude(mean)",
        ("structure",),
    ),
    Mutant(
        "the reciprocal of a root as each loop likes",
        "_group_norm.py",
        "    return 1 / lax.select(is_zero, jnp.full_like(x, jnp.inf), root)\n",
        "    return 1 / jnp.sqrt(lax.select(is_zero, jnp.full_like(x, jnp.inf), x))\n",
        ("structure",),
    ),
    Mutant(
        "products that sum the last rows in another order",
        "_groups.py",
        "    more = -groups % ROWS\n",
        "    more = 0\n",
        ("structure",),
    ),
    Mutant(
        "products of half as many rows at once",
        "_groups.py",
        "ROWS = 4\n",
        "ROWS = 2\n",
        ("structure",),
    ),
    Mutant(
        "the rest of the mean forgotten",
        "_moments.py",
        "m - (pivot - k)",
        "0 * m",
        ("values", "derivatives"),
    ),
    Mutant(
        "missing clamp",
        "_group_norm.py",
        CLAMPED,
        "measured",
        ("values",),
    ),
    Mutant(
        "a clamp that halves the derivative",
        "_group_norm.py",
        CLAMPED,
        "jnp.maximum(measured, 0)",
        ("derivatives",),
    ),
    Mutant(
        "a clamp without derivatives",
        "_moments.py",
        "x - lax.stop_gradient(lax.select(condition, x, jnp.zeros_like(x)))",
        "jnp.where(condition, 0, x)",
        ("values", "derivatives"),
    ),
    Mutant(
        "a clamp at 0, whatever rounding leaves",
        "_moments.py",
        "ROUNDED = 512\n",
        "ROUNDED = 0\n",
        ("values",),
    ),
    Mutant(
        "what rounding leaves of the mean of equal elements",
        "_group_norm.py",
        "    rest = zero_where(constant, rest)",
        "    rest = rest",
        ("values",),
    ),
    Mutant(
        "moments of half precision",
        "_group_norm.py",
        "m, measured = reduction.moments(x, k, q, n)",
        "m, measured = (lax.reduce_precision(v, 5, 10) for v in reduction.moments(x, k, q, n))",
        ("values",),
    ),
    Mutant(
        "statistics in the output's dtype",
        "_group_norm.py",
        "compute_dtype=_widest(input_dtype, output_dtype, jnp.float32)",
        "compute_dtype=_widest(output_dtype, jnp.float32)",
        ("values",),
    ),
    Mutant(
        "activation after rounding",
        "_group_norm.py",
        "else _activated(y, activation, output_dtype)",
        "else _activated(y.astype(output_dtype), activation, output_dtype)",
        ("values",),
    ),
    Mutant(
        "products of less than float32",
        "_groups.py",
        "precision=lax.Precision.HIGHEST",
        "precision=lax.Precision.DEFAULT",
        ("structure",),
    ),
    # Derivatives
    Mutant(
        "no gradient through the variance",
        "_group_norm.py",
        "_inverse_sqrt(sigma_squared + epsilon)",
        "_inverse_sqrt(lax.stop_gradient(sigma_squared) + epsilon)",
        ("derivatives",),
    ),
    Mutant(
        "no gradient through the mean",
        "_group_norm.py",
        "    m, measured = reduction.moments(x, k, q, n)\n",
        "    m, measured = reduction.moments(x, k, q, n)\n    m = lax.stop_gradient(m)\n",
        ("derivatives",),
    ),
    Mutant(
        "right for first derivatives only",
        "_moments.py",
        VARIANCE,
        "sum_shifted.real / n - "
        "((2 * m - lax.stop_gradient(m)) * jnp.conj(lax.stop_gradient(m))).real + q",
        ("derivatives",),
    ),
    Mutant(
        "the mean's square without a gradient",
        "_moments.py",
        VARIANCE,
        "(sum_shifted.real - n * _squared_magnitude(lax.stop_gradient(m))) / n + q",
        ("derivatives",),
    ),
    Mutant(
        "no derivative where variance and epsilon are 0",
        "_group_norm.py",
        "    root = jnp.sqrt(lax.select(is_zero, jnp.ones_like(x), x))\n",
        "    root = jnp.sqrt(x)\n",
        ("values", "derivatives"),
    ),
    Mutant(
        "everything kept for the backward pass",
        "_group_norm.py",
        "checkpoint_policies.save_only_these_names(residuals)",
        "checkpoint_policies.everything_saveable",
        ("residuals",),
    ),
    Mutant(
        "moments computed twice",
        "_group_norm.py",
        "checkpoint_policies.save_only_these_names(residuals)",
        "checkpoint_policies.nothing_saveable",
        ("structure", "sharding"),
    ),
    Mutant(
        "differences merged across the passes",
        "_group_norm.py",
        "prevent_cse=positions.number != 1",
        "prevent_cse=False",
        ("residuals",),
    ),
    Mutant(
        "an activation's arrays stay what they were in the first call",
        "_activation.py",
        "[isinstance(leaf, Array | np.ndarray) for leaf in leaves]",
        "[False for leaf in leaves]",
        ("activation",),
    ),
    Mutant(
        "squares of the sample overflow",
        "_moments.py",
        "jnp.minimum(_squared_magnitude(x), largest)",
        "_squared_magnitude(x)",
        ("values",),
    ),
    Mutant(
        "as many shards in every index group as in the first",
        "_moments.py",
        "jnp.asarray(on_each) if differs else on_each",
        "on_each",
        ("sharding",),
    ),
    # Masks and what is not finite
    Mutant(
        "mask ignored",
        "_moments.py",
        "d = self._where_counted(x - along_k)",
        "d = x - along_k",
        ("mask",),
    ),
    Mutant(
        "mask ignored in the variance",
        "_moments.py",
        "self._where_counted((_squared_magnitude(d) - along_q).astype(d.dtype))",
        "(_squared_magnitude(x - along_k) - along_q).astype(d.dtype)",
        ("mask",),
    ),
    Mutant(
        "mask ignored in k",
        "_moments.py",
        "sums(self._where_counted(x), counts)",
        "sums(x, counts)",
        ("mask",),
    ),
    Mutant(
        "masked elements counted",
        "_moments.py",
        "counts = self._where_counted(jnp.ones_like(x))",
        "counts = jnp.ones_like(x)",
        ("mask", "groups"),
    ),
    Mutant(
        "an empty mask divides by 0",
        "_moments.py",
        "jnp.maximum(number.real, 1)",
        "number.real",
        ("mask",),
    ),
    Mutant(
        "NaN under the mask multiplied by 0",
        "_group_norm.py",
        "        return jnp.where(mask | (jnp.abs(x) < math.sqrt(jnp.finfo(x.dtype).max)), x, 0)\n",
        "        return x\n",
        ("mask",),
    ),
    Mutant(
        "NaN hidden outside the mask, too",
        "_group_norm.py",
        "jnp.where(mask | (jnp.abs(x)",
        "jnp.where((jnp.abs(x)",
        ("mask", "nan"),
    ),
    Mutant(
        "positions under the mask not normalized",
        "_group_norm.py",
        "        return jnp.where(mask | (jnp.abs(x) < math.sqrt(jnp.finfo(x.dtype).max)), x, 0)\n",
        "        return jnp.where(mask, x, 0)\n",
        ("mask",),
    ),
    Mutant(
        "a NaN reaches other groups",
        "_groups.py",
        "    return product[..., :groups, :] if more else product\n",
        "    product = product + 0 * product.sum()\n"
        "    return product[..., :groups, :] if more else product\n",
        ("nan",),
    ),
    # Shared statistics
    Mutant(
        "a mean of means",
        "_moments.py",
        SHARED,
        "        alone = self._replace(shards=Shards(None, None))\n"
        "        sums = self.groups.sum(self.positions.sums(d, shifted))\n"
        "        sums = sums / alone.shifts(x)[2].astype(sums.dtype)\n"
        "        if self.shards.axis_name is not None:\n"
        "            sums = lax.pmean(sums, self.shards.axis_name)\n"
        "        sums = sums * n.astype(sums.dtype)\n",
        ("sharding",),
    ),
    Mutant(
        "index groups ignored",
        "_moments.py",
        "return lax.psum(value, self.axis_name, axis_index_groups=self.axis_index_groups)",
        "return lax.psum(value, self.axis_name)",
        ("sharding",),
    ),
    Mutant(
        "each shard around its own pivot",
        "_moments.py",
        "total, number = self.positions.unpair(sums)",
        "alone = self.groups.sum(self.positions.sums(self._where_counted(x), counts))\n"
        "        total, _ = self.positions.unpair(alone)\n"
        "        _, number = self.positions.unpair(sums)",
        ("sharding",),
    ),
    # How it is computed
    Mutant(
        "x reshaped",
        "_group_norm.py",
        "    stopped = widened(lax.stop_gradient(x))\n",
        "    x = x.reshape(-1).reshape(x.shape)\n    stopped = widened(lax.stop_gradient(x))\n",
        ("structure",),
    ),
    Mutant(
        "an operation outside the compiled function",
        "_group_norm.py",
        "    axes = resolve_axes(x.ndim, channel_axis, reduction_axes)\n",
        "    axes = resolve_axes((x * 1).ndim, channel_axis, reduction_axes)\n",
        ("structure",),
    ),
    Mutant(
        "two passes for two sums",
        "_blocks.py",
        "self._blocks = _blocks(x, axes, largest, self._few)",
        "self._blocks = []",
        ("structure",),
    ),
    Mutant(
        "two short sums that XLA makes one long of",
        "_blocks.py",
        "            both = lax.conj(block.sum(both))\n",
        "            both = block.sum(both)\n",
        ("structure",),
    ),
    Mutant(
        "the second sum not conjugated",
        "_blocks.py",
        "            both = lax.conj(block.sum(both))\n",
        "            both = block.sum(both)\n",
        ("groups",),
    ),
    Mutant(
        "the second value spread not conjugated",
        "_blocks.py",
        "            both = block.spread(lax.conj(both))\n",
        "            both = block.spread(both)\n",
        ("groups",),
    ),
    Mutant(
        "the parts of a pair taken as they stand",
        "_blocks.py",
        "        both = self._as_after_the_blocks(pair)\n",
        "        both = pair\n",
        ("groups",),
    ),
    Mutant(
        "blocks of samples, too",
        "_blocks.py",
        "known = {axis: x.shape[axis] for axis in axes.spatial if",
        "known = {axis: x.shape[axis] for axis in (*axes.batch, *axes.spatial) if",
        ("groups", "values"),
    ),
    Mutant(
        "plain broadcasts of groups of every size",
        "_groups.py",
        "else self.size % LANES != 0\n",
        "else False\n",
        ("structure",),
    ),
    Mutant(
        "products for groups of every size",
        "_groups.py",
        "on_one_cpu and in_the_innermost_loop and dear and self.size != 1",
        "on_one_cpu and self.size != 1",
        ("structure",),
    ),
    Mutant(
        "large groups summed one channel after another",
        "_groups.py",
        "_split_into_lanes(self.size) if has_lanes else (self.size, 1, 1)",
        "(self.size, 1, 1)",
        ("structure",),
    ),
    Mutant(
        "large groups summed along one axis",
        "_groups.py",
        "math.gcd(size // lanes, MANY)",
        "1",
        ("structure",),
    ),
    Mutant(
        "the sums over positions and over all channels as one",
        "_groups.py",
        "per_channel.reshape(*groups, *self._lane_shape).sum((-3, -2))",
        "per_channel.reshape(*groups, -1, self._lane_shape[-1]).sum(-2)",
        ("structure",),
    ),
    Mutant(
        "lanes and what is in them summed at once",
        "_groups.py",
        "jnp.conj(jnp.conj(of_lanes).sum(-1))",
        "of_lanes.sum(-1)",
        ("structure",),
    ),
    Mutant(
        "large groups spread at once",
        "_groups.py",
        "jnp.conj(jnp.broadcast_to(jnp.conj(per_group)[..., None], lanes))",
        "jnp.broadcast_to(per_group[..., None], lanes)",
        ("structure",),
    ),
    Mutant(
        "long sums at once for k",
        "_blocks.py",
        "MOST_OF_ONE_SUM = 128\n",
        "MOST_OF_ONE_SUM = 2**30\n",
        ("structure",),
    ),
    Mutant(
        "what blocks leave in one sum, however much it is",
        "_blocks.py",
        "ENOUGH, LONGEST, LONGEST_OF_SEVERAL = 64, 256, 64\n",
        "ENOUGH, LONGEST, LONGEST_OF_SEVERAL = 64, 2**30, 2**30\n",
        ("values",),
    ),
    Mutant(
        "what blocks leave along several axes summed as along one",
        "_blocks.py",
        "ENOUGH, LONGEST, LONGEST_OF_SEVERAL = 64, 256, 64\n",
        "ENOUGH, LONGEST, LONGEST_OF_SEVERAL = 64, 256, 256\n",
        ("values",),
    ),
    Mutant(
        "numbers of an activation that are equal taken for the same",
        "_activation.py",
        "repr(leaf) for leaf in others",
        '"" for leaf in others',
        ("activation",),
    ),
    Mutant(
        "an empty result placed nowhere",
        "_group_norm.py",
        "        return x.astype(output_dtype)\n",
        "        return jnp.zeros(x.shape, output_dtype)\n",
        ("sharding",),
    ),
    Mutant(
        "an array converted, as what is none",
        "_group_norm.py",
        "    if isinstance(value, Array):",
        "    if isinstance(value, Array) and value is None:",
        ("transformations",),
    ),
    Mutant(
        "no padded blocks",
        "_blocks.py",
        "_best_padded(of_one_device)",
        "None",
        ("structure",),
    ),
    Mutant(
        "few positions summed as they are",
        "_blocks.py",
        " or _largest(whole)",
        "",
        ("structure",),
    ),
    Mutant(
        "no padding but of whole blocks",
        "_blocks.py",
        "(block.size - 1) * block.stride < block.positions",
        "block.size * block.stride < block.positions",
        ("structure",),
    ),
    Mutant(
        "large blocks of narrow numbers",
        "_blocks.py",
        "LARGEST_BLOCK if x.dtype.itemsize > 2 else LARGEST_NARROW_BLOCK",
        "LARGEST_BLOCK",
        ("structure",),
    ),
    Mutant(
        "blocks of widened numbers",
        "_group_norm.py",
        "positions_of(x, axes, compute_dtype)",
        "positions_of(constant, axes, compute_dtype)",
        ("structure",),
    ),
    Mutant(
        "two plain sums where there is no block",
        "_blocks.py",
        "not self._blocks and not self.on_one_cpu",
        "not self._blocks",
        ("structure",),
    ),
    Mutant(
        "a loop over pairs where each device would have parts of blocks",
        "_blocks.py",
        "not self._blocks and not self.on_one_cpu",
        "False",
        ("structure",),
    ),
    Mutant(
        "products for one group wherever anything is padded",
        "_blocks.py",
        "bool(self._blocks) and self._blocks[0].may_be_padded",
        "any(block.may_be_padded for block in self._blocks)",
        ("structure",),
    ),
    Mutant(
        "positions behind the last whole block forgotten",
        "_blocks.py",
        "        padded = self._padded(x) if self.may_be_padded else x\n",
        "        whole = self.positions // (self.size * self.stride) * self.size * self.stride\n"
        "        behind = (*[slice(None)] * self.axis, slice(whole, None))\n"
        "        padded = self._padded(x.at[behind].set(0)) if self.may_be_padded else x\n",
        ("groups",),
    ),
    Mutant(
        "complex numbers padded",
        "_blocks.py",
        "by_components(lambda real: lax.pad(real, jnp.zeros((), real.dtype), behind), x)",
        "lax.pad(x, jnp.zeros((), x.dtype), behind)",
        ("structure",),
    ),
    Mutant(
        "one group's values in branches",
        "_groups.py",
        "positions.are_padded if num_groups == 1",
        "False if num_groups == 1",
        ("structure",),
    ),
    Mutant(
        "padded blocks of complex numbers taken for whole ones",
        "_blocks.py",
        "return self._of_a_component.are_padded",
        "return False",
        ("structure",),
    ),
    Mutant(
        "complex numbers summed as they are",
        "_group_norm.py",
        "ComplexPositions(x, axes) if is_complex else PositionsInBlocks(x, axes)",
        "Positions(x, axes) if is_complex else PositionsInBlocks(x, axes)",
        ("values",),
    ),
    Mutant(
        "imaginary parts taken for real ones",
        "_positions.py",
        "function(*(x.imag for x in arrays))",
        "function(*(x.real for x in arrays))",
        ("values",),
    ),
    Mutant(
        "blocks of which devices have parts",
        "_blocks.py",
        ".segments % shares[axis]",
        ".segments % 1",
        ("sharding",),
    ),
    Mutant(
        "padded blocks of an axis that devices share",
        "_blocks.py",
        "if may_pad and shares[block.axis] == 1]",
        "if may_pad]",
        ("sharding",),
    ),
    Mutant(
        "blocks of an axis that is split explicitly, whole on every device",
        "_blocks.py",
        "self._explicit_sharding = jax.typeof(x).sharding if is_split else None",
        "self._explicit_sharding = None",
        ("sharding",),
    ),
    Mutant(
        "one sum over one group's channels and what blocks leave",
        "_groups.py",
        "return jnp.conj(jnp.conj(per_channel).sum(-1, keepdims=True))",
        "return per_channel.sum(-1, keepdims=True)",
        ("structure",),
    ),
    Mutant(
        "one sum over one group's channels and what blocks leave, backward",
        "_groups.py",
        "self._repeated(per_group) if jnp.iscomplexobj(per_group) else per_group",
        "per_group",
        ("structure",),
    ),
    Mutant(
        "blocks of symbolic sizes along neighbours in memory, too",
        "_blocks.py",
        "[axis for axis in sizes if _stride(x, axis) == 1] or list(sizes)",
        "list(sizes)",
        ("groups",),
    ),
    Mutant(
        "no blocks of symbolic sizes",
        "_blocks.py",
        "if symbolic and devices_of_a_sample(x, axes) == 1:",
        "if False:",
        ("values",),
    ),
    Mutant(
        "plain sums of what is one device's own",
        "_devices.py",
        "kinds if kind == AxisType.Auto",
        "kinds",
        ("sharding",),
    ),
    Mutant(
        "blocks of axes that are known to be split",
        "_devices.py",
        "return known * automatic_devices(x)",
        "return automatic_devices(x)",
        ("sharding",),
    ),
    Mutant(
        "plain sums where the batch alone is split",
        "_devices.py",
        "for axis in (*axes.spatial, axes.channel))\n",
        "for axis in range(x.ndim))\n",
        ("sharding",),
    ),
    Mutant(
        "a sum over devices of as many numbers as x has",
        "_moments.py",
        "pair = varying_as(x, self.positions.pair(u, v))",
        "pair = self.positions.pair(u, v)",
        ("sharding",),
    ),
    Mutant(
        "a mesh that only a context names",
        "_groups.py",
        "reshard(values, self._sharding(values, channel_names))",
        "reshard(values, self._sharding(values, channel_names).spec)",
        ("sharding",),
    ),
    Mutant(
        "a mask left where it lies",
        "_group_norm.py",
        "        mask = split_as(x, range(x.ndim - mask.ndim, x.ndim), mask)\n",
        "",
        ("sharding",),
    ),
    Mutant(
        "a scale left where it lies",
        "_group_norm.py",
        "    values = split_as(x, (*axes.batch, axes.channel)[missing:], values)\n",
        "",
        ("sharding",),
    ),
    Mutant(
        "one value for all split over devices",
        "_devices.py",
        "of_x.spec[axis] if size != 1 else None for",
        "of_x.spec[axis] for",
        ("sharding",),
    ),
    Mutant(
        "parts on a GPU for the samples of all of them",
        "_parts.py",
        "/ CHANNELS_OF_A_SUM) // sharing",
        "/ CHANNELS_OF_A_SUM)",
        ("structure",),
    ),
    Mutant(
        "the two sums of parts exchanged",
        "_parts.py",
        "self.pair(*map(self._part.sum, (u, v)))",
        "self.pair(*map(self._part.sum, (v, u)))",
        ("groups",),
    ),
    Mutant(
        "all positions at once on a GPU",
        "_parts.py",
        "self._part = _part(x, axes)",
        "self._part = None",
        ("structure",),
    ),
    Mutant(
        "parts on a GPU that a device has a part of",
        "_parts.py",
        "divisors(shape[axis] // math.gcd(shape[axis], devices))",
        "divisors(shape[axis])",
        ("sharding",),
    ),
    Mutant(
        "axes merged on a GPU that devices may share",
        "_parts.py",
        "x.shape if devices > 1 else (*x.shape[:first], number, x.shape[-1])",
        "(*x.shape[:first], number, x.shape[-1])",
        ("structure",),
    ),
    Mutant(
        "parts of one size on a GPU, however few they are",
        "_parts.py",
        "if sums // part.positions >= ENOUGH_SUMS]",
        "]",
        ("structure",),
    ),
    Mutant(
        "a gradient of the pivot on a GPU",
        "_group_norm.py",
        "positions.along(lax.stop_gradient(pivot))",
        "positions.along(pivot)",
        ("structure",),
    ),
    Mutant(
        "the two values of a pair exchanged",
        "_positions.py",
        "        return pair[0], pair[1]\n",
        "        return pair[1], pair[0]\n",
        ("values",),
    ),
    # The door
    Mutant(
        "a number of groups that does not divide",
        "_axes.py",
        "    if channels % divisor:\n",
        "    if channels < divisor:\n",
        ("errors",),
    ),
    Mutant(
        "epsilon unchecked",
        "_group_norm.py",
        "    if not 0 <= value < math.inf:\n",
        "    if not value < math.inf:\n",
        ("errors",),
    ),
    Mutant(
        "a scale that broadcasts",
        "_group_norm.py",
        "if values.shape not in ((channels,), rows):",
        "if values.shape not in ((channels,), rows, (1, channels)):",
        ("errors", "properties"),
    ),
    # The layers
    Mutant(
        "flax's epsilon",
        "_linen.py",
        "epsilon: float = 1e-5",
        "epsilon: float = 1e-6",
        ("linen",),
    ),
    Mutant(
        "the layer forgets the mask",
        "_linen.py",
        "            mask=mask,\n",
        "",
        ("linen",),
    ),
    Mutant(
        "the layer forgets its activation",
        "_linen.py",
        "            activation=self.activation,\n",
        "",
        ("linen",),
    ),
    Mutant(
        "the layer forgets the dtype of its parameters",
        "_linen.py",
        "(channels,), self.param_dtype)",
        "(channels,))",
        ("linen",),
    ),
    Mutant(
        "nnx: the mask forgotten",
        "nnx.py",
        "            mask=mask,\n",
        "",
        ("nnx",),
    ),
    Mutant(
        "torch's epsilon forgotten",
        "interop.py",
        "epsilon=checked_epsilon(module.eps)",
        "epsilon=1e-5",
        ("interop",),
    ),
)


def apply(mutant: Mutant, package: pathlib.Path) -> None:
    """Writes the mistake into a copy of the package."""
    file = package / mutant.file
    source = file.read_text()
    if source.count(mutant.right) != 1:
        raise ValueError(
            f"{mutant.name}: its place must be in {mutant.file} once: "
            f"found {source.count(mutant.right)} times; write the mutant anew."
        )
    file.write_text(source.replace(mutant.right, mutant.wrong))


def first_failure(tests: tuple[str, ...], cache: pathlib.Path, mutant: Mutant | None) -> str | None:
    """What pytest says of the first test that fails; None if all pass."""
    with tempfile.TemporaryDirectory(dir=cache.parent) as directory:
        copy = pathlib.Path(directory)
        shutil.copytree(ROOT / "jgn", copy / "jgn")
        shutil.copytree(ROOT / "tests", copy / "tests")
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant is not None:
            apply(mutant, copy / "jgn")
            # What it compiles is of no use to the others.
            cache = shutil.copytree(cache, copy / "cache", copy_function=os.link)
        finished = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
            + [f"tests/test_{name}.py" for name in tests],
            cwd=copy,
            env={
                **os.environ,
                "PYTHONPATH": directory,
                "JAX_COMPILATION_CACHE_DIR": str(cache),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "PYTEST_ADDOPTS": "",
                "COLUMNS": "200",  # So that pytest's summary has room for what was wrong.
            },
            capture_output=True,
            text=True,
        )
    if finished.returncode not in (0, 1):  # Neither passed nor failed: it did not run.
        name = "without any mistake" if mutant is None else mutant.name
        raise RuntimeError(f"{name}: pytest ended with {finished.stdout}{finished.stderr}")
    failures = re.findall("^(?:FAILED|ERROR) tests/.*", finished.stdout, re.MULTILINE)
    return failures[-1] if finished.returncode else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="all mutants, unless named")
    parser.add_argument("--jobs", type=int, default=2, help="how many at a time (2)")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs must be 1 or more: got {options.jobs}")
    if unknown := set(options.names) - {mutant.name for mutant in MUTANTS}:
        parser.error(f"no mutants of these names: {', '.join(sorted(unknown))}")
    chosen = [m for m in MUTANTS if not options.names or m.name in options.names]
    survivors = 0
    with (
        tempfile.TemporaryDirectory() as directory,
        concurrent.futures.ThreadPoolExecutor(options.jobs) as pool,
    ):
        cache = pathlib.Path(directory, "compiled")
        cache.mkdir()
        files = sorted({name for mutant in chosen for name in mutant.tests})
        for failure in pool.map(lambda name: first_failure((name,), cache, None), files):
            if failure is not None:
                sys.exit(f"without any mistake: {failure}")
        failures = pool.map(lambda mutant: first_failure(mutant.tests, cache, mutant), chosen)
        for mutant, failure in zip(chosen, failures, strict=True):
            survivors += failure is None
            print(f"{mutant.name}: {failure or 'SURVIVED'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
