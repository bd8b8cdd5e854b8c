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
    def splits(self) -> int:
        """Devices may split a partition in so many parts, or in a divisor of this number."""
        return math.gcd(self.positions // self.partitions, self.automatic_devices)

    @property
    def parts(self) -> int:
        """In how many parts not too many devices may split the axis."""
        return self.partitions * max(n for n in divisors(self.splits) if n <= MOST_PARTS)


class Taken(NamedTuple):
    """Positions of an axis: this slice of each of its equal shares."""

    shares: int
    of_each: slice

    def of(self, x: Array, axis: int) -> Array:
        """x at these positions."""
        before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
        start, stop, stride = self.of_each.start, self.of_each.stop, self.of_each.step
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
    if side.parts == 1:
        if side.positions >= ENOUGH_FOR_TWO:
            one_in = min(one_in, side.positions - 1)
        return Taken(1, _centered(side.positions, one_in, multiple_of))
    part = side.positions // side.parts
    if side.partitions == 1 and side.positions < min(ENOUGH_FOR_TWO, one_in + 1):
        # A single one, of the first part: one of another would travel.
        return Taken(1, slice(part // 2, part // 2 + 1, 1))
    if side.splits & (side.splits - 1):
        # Of 3 shares neither of 2 devices has whole ones, and XLA would send all of x. Where
        # strides divide each part nothing travels, either.
        return Taken(1, _of_every_part(side.positions, part, one_in))
    # Of shares that may have two halves, an even number of positions, as far from one end as from
    # the other, is as many of each half, at any stride. (Explicit partitions cannot be joined.)
    halves = 2 if side.splits > 1 else 1
    shares = side.parts // halves
    return Taken(shares, _centered(part * halves, one_in, halves, is_shared=True))


def _centered(size: int, one_in: int, multiple_of: int, is_shared: bool = False) -> slice:
    """At least one in so many, as far from one end as from the other."""
    number = math.ceil(size / one_in)
    multiple = math.ceil(number / multiple_of) * multiple_of
    number = multiple if multiple <= size else number
    stride = _stride_of(size, number, is_shared)
    start = (size - 1 - (number - 1) * stride) // 2
    return slice(start, start + (number - 1) * stride + 1, stride)


def _of_every_part(size: int, part: int, one_in: int) -> slice:
    stride = max(stride for stride in divisors(part) if stride <= one_in)
    # Of patterns with this period most begin at 0, or in the middle.
    start = stride // 3 or stride // 2
    return slice(start, size - (stride - start) + 1, stride)


def _symbolic(side: Side, one_in: int) -> slice:
    """As far from one end as from the other; all of what is split, as its slices must divide."""
    size = side.positions
    # Odd, so that every phase of what repeats every 2, 4, 8, … positions is taken as often.
    stride = one_in - 1 + one_in % 2 if side.partitions == 1 else 1
    # JAX wants to see that it does not begin beyond the end, of a size that may be 0, too.
    return slice(min_dim(size, (size - 1) % stride // 2), size, stride)


def _stride_of(size: int, number: int, is_shared: bool) -> int:
    """How far apart so many positions of an axis are, for the sample to take all phases alike.

    Of what repeats every 2, 4, 8, … positions, and if such a stride is near, of every 3, 6, 12, ….
    Small strides stay as they are: they miss few phases. But in shares that follow each other, all
    positions have the same phase of what repeats with a stride that divides the share.
    """
    stride = size // number
    largest = (size - 1 - stride // 2) // max(1, number - 1)
    near = [stride, stride + 1, stride - 1]
    if is_shared:
        near += [stride + 2, stride - 2]

    def misses(stride: int) -> tuple[bool, ...]:
        divides = is_shared and math.gcd(stride, size) > 1
        return stride % 2 == 0, divides, stride % 3 == 0

    smallest = 1 if is_shared else 5
    return min((s for s in near if smallest <= s <= largest), key=misses, default=stride)
