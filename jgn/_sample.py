"""Which positions are a sample: some from all over, few of them at a border.

What is unlike the rest of an image is often a row, a plane or a frame, or repeats every 2, 4 or 8
positions. A sample of nothing else would have a mean far from that of the whole.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from jax.core import min_dim

from jgn._axes import divisors

# Along later axes so many positions are skipped at most before more are along earlier ones. (Where
# one in 6 is enough, most strides are 5, which has no factor in common with most periods. A device
# often has 7 positions of a shared axis: of these no smaller stride takes as many of each.)
LATER_STRIDE, LATER_STRIDE_OF_SHARED = 6, 8
# Of so many positions along an axis two are taken at least: one may be unlike the others.
ENOUGH_FOR_TWO = 5
# Axes are seldom split over more devices. Where they are, some of the sample travels.
MOST_SHARES = 8


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
        """Equal parts, of which each of not too many devices has whole ones."""
        if not self.is_known:
            return self.partitions
        of_a_partition = math.gcd(self.positions // self.partitions, self.automatic_devices)
        return self.partitions * max(s for s in divisors(of_a_partition) if s <= MOST_SHARES)


def sample_of(sides: Sequence[Side], one_in: int, multiple_of: int = 1) -> list[slice]:
    """Slices of these axes, which take at least one in so many positions, evenly spaced.

    Along the last of several positions they take a multiple of this number, if there are enough and
    no devices may share them.
    """
    last = last_of_several([side.positions for side in sides])
    slices = []
    for axis, side in enumerate(sides):
        without_later = one_in
        for later in sides[axis + 1 : last + 1]:
            stride = LATER_STRIDE if later.shares == 1 else LATER_STRIDE_OF_SHARED
            taken = _evenly_spaced(later, stride)
            without_later = _one_in_of_others(without_later, later, taken)
        taken = _evenly_spaced(side, without_later, multiple_of if axis == last else 1)
        one_in = _one_in_of_others(one_in, side, taken)
        slices.append(taken)
    return slices


def last_of_several(sizes: Sequence[Any]) -> int:
    """The last axis of at least 3 positions, or if none has as many, the last."""
    several = [axis for axis, size in enumerate(sizes) if not (isinstance(size, int) and size < 3)]
    return max(several, default=len(sizes) - 1)


def _one_in_of_others(one_in: int, side: Side, taken: slice) -> int:
    """One in how many positions of the other axes is enough, once so many of this one are taken."""
    # A step that does not divide the size takes fewer than one position a step.
    if not side.is_known:
        return max(1, one_in // taken.step)
    return max(1, one_in * len(range(side.positions)[taken]) // side.positions)


def _evenly_spaced(side: Side, one_in: int, multiple_of: int = 1) -> slice:
    """At least one in so many of an axis."""
    if not side.is_known:
        return _symbolic(side, one_in)
    if side.positions >= ENOUGH_FOR_TWO:
        one_in = min(one_in, side.positions - 1)
    return _shared(side, one_in) if side.shares > 1 else _whole(side.positions, one_in, multiple_of)


def _whole(size: int, one_in: int, multiple_of: int) -> slice:
    """As far from one end as from the other."""
    number = math.ceil(size / one_in)
    multiple = math.ceil(number / multiple_of) * multiple_of
    number = multiple if multiple <= size else number
    stride = _stride_of(size, number)
    start = (size - 1 - (number - 1) * stride) // 2
    return slice(start, start + (number - 1) * stride + 1, stride)


def _shared(side: Side, one_in: int) -> slice:
    """As many of each share, so that none travels."""
    of_a_share = side.positions // side.shares
    if side.positions <= one_in and side.partitions == 1:
        # A single one, of the first share: one of another would travel.
        return slice(of_a_share // 2, of_a_share // 2 + 1, 1)
    stride = max(stride for stride in divisors(of_a_share) if stride <= one_in)
    # Of patterns with this period most begin at 0, or in the middle.
    start = stride // 3 or stride // 2
    return slice(start, side.positions - (stride - start) + 1, stride)


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
    Small strides stay as they are: they miss few phases.
    """
    stride = size // number
    largest = (size - 1 - stride // 2) // max(1, number - 1)
    near = [s for s in (stride, stride + 1, stride - 1) if 5 <= s <= largest]
    return min(near, key=lambda s: (s % 2 == 0, s % 3 == 0), default=stride)
