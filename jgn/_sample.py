"""Which positions are a sample: some from all over, few of them at a border.

What is unlike the rest of an image is often a row, a plane or a frame, or repeats every 2, 4 or 8
positions. A sample of nothing else would have a mean far from that of the whole.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import Array, lax
from jax.core import min_dim

from jgn._axes import divisors

# Along later axes so many positions are skipped at most before more are along earlier ones. (Where
# one in 6 is enough, most strides are 5, which has no factor in common with most periods.)
LATER_STRIDE = 6
# Of so many positions along an axis two are taken at least: one may be unlike the others.
ENOUGH_FOR_TWO = 5
# Axes are seldom split over more devices. Where they are, some of the sample travels.
MOST_PARTS = 8


class Side(NamedTuple):
    """An axis of x.

    positions: How many there are: an int, or symbolic.
    partitions: In how many parts explicitly typed mesh axes split them.
    automatic_devices: How many devices may split each of these further.
    """

    positions: Any
    partitions: int = 1
    automatic_devices: int = 1

    @property
    def is_known(self) -> bool:
        return isinstance(self.positions, int)

    @property
    def shares(self) -> int:
        """Equal parts, of which each of not too many devices has whole ones, or a half."""
        return self.partitions * self._parts_of_a_partition // (2 if self.has_halves else 1)

    @property
    def has_halves(self) -> bool:
        """Whether two devices may have a share."""
        return self._parts_of_a_partition % 2 == 0

    @property
    def _parts_of_a_partition(self) -> int:
        if not self.is_known:
            return 1
        possible = divisors(math.gcd(self.positions // self.partitions, self.automatic_devices))
        return max(parts for parts in possible if parts <= MOST_PARTS)


class Taken(NamedTuple):
    """Positions of an axis: this slice of each of its equal shares."""

    shares: int
    of_each: slice

    def of(self, x: Array, axis: int) -> Array:
        """x at these positions."""
        before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
        start, stop, stride = self.of_each.start, self.of_each.stop, self.of_each.step
        if self.shares == 1:
            return lax.slice_in_dim(x, start, stop, stride, axis)
        in_shares = x.reshape(*before, self.shares, size // self.shares, *after)
        taken = lax.slice_in_dim(in_shares, start, stop, stride, axis + 1)
        return taken.reshape(*before, self.shares * taken.shape[axis + 1], *after)


def sample_of(sides: Sequence[Side], one_in: int, multiple_of: int = 1) -> list[Taken]:
    """What takes at least one in so many positions of these axes, evenly spaced.

    Along the last of several positions they are a multiple of this number, if there are enough and
    no devices may share them.
    """
    last = last_of_several([side.positions for side in sides])
    sample = []
    for axis, side in enumerate(sides):
        without_later = one_in
        for later in sides[axis + 1 : last + 1]:
            taken = _evenly_spaced(later, LATER_STRIDE)
            without_later = _one_in_of_others(without_later, later, taken)
        taken = _evenly_spaced(side, without_later, multiple_of if axis == last else 1)
        one_in = _one_in_of_others(one_in, side, taken)
        sample.append(taken)
    return sample


def last_of_several(sizes: Sequence[Any]) -> int:
    """The last axis of at least 3 positions, or if none has as many, the last."""
    several = [axis for axis, size in enumerate(sizes) if not (isinstance(size, int) and size < 3)]
    return max(several, default=len(sizes) - 1)


def _one_in_of_others(one_in: int, side: Side, taken: Taken) -> int:
    """One in how many positions of the other axes is enough, once so many of this one are taken."""
    # A step that does not divide the size takes fewer than one position a step.
    if not side.is_known:
        return max(1, one_in // taken.of_each.step)
    share = range(side.positions // taken.shares)
    return max(1, one_in * len(share[taken.of_each]) // len(share))


def _evenly_spaced(side: Side, one_in: int, multiple_of: int = 1) -> Taken:
    """At least one in so many of an axis; of each device's as many, so that none travels."""
    if not side.is_known:
        return Taken(1, _symbolic(side, one_in))
    share = side.positions // side.shares
    if share >= ENOUGH_FOR_TWO:
        one_in = min(one_in, share - 1)
    multiple_of = 2 if side.has_halves else multiple_of
    number = math.ceil(share / one_in)
    multiple = math.ceil(number / multiple_of) * multiple_of
    number = multiple if multiple <= share else number
    # As far from one end as from the other.
    stride = _stride_of(share, number)
    start = (share - 1 - (number - 1) * stride) // 2
    return Taken(side.shares, slice(start, start + (number - 1) * stride + 1, stride))


def _symbolic(side: Side, one_in: int) -> slice:
    """As far from one end as from the other; all of what is split, as its slices must divide."""
    size = side.positions
    # Odd, so that every phase of what repeats every 2, 4, 8, … positions is taken as often.
    stride = one_in - 1 + one_in % 2 if side.partitions == 1 else 1
    # JAX wants to see that it does not begin beyond the end, of a size that may be 0, too.
    return slice(min_dim(size, (size - 1) % stride // 2), size, stride)


def _stride_of(size: int, number: int) -> int:
    """How far apart so many positions of an axis are, for the sample to take all phases alike.

    Of what repeats every 2, 4, 8, … positions, and if such a stride is near, of every 3, 6, 12, ….
    Strides below 4 stay as they are: they miss few phases.
    """
    stride = size // number
    largest = (size - 1 - stride // 2) // max(1, number - 1)
    near = [s for s in (stride, stride + 1, stride - 1) if stride >= 4 and s <= largest]
    return min(near, key=lambda s: (s % 2 == 0, s % 3 == 0), default=stride)
