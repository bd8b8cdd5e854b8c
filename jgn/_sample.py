"""Which positions are a sample: from all over, and where every third or fewer, none at a border.

What is unlike the rest of an image is often a row, a plane or a frame, or repeats every 2, 4 or 8
positions. A sample of nothing else would have a mean far from that of the whole.
"""

import math
from collections.abc import Sequence
from typing import Any

from jgn._axes import divisors

# Along later axes so many positions are skipped at most before more are along earlier ones. (Where
# one in 6 is enough, most strides are 5, which has no factor in common with most periods.)
LATER_STRIDE = 6


def sample_of(sizes: Sequence[Any], one_in: int, devices: int, multiple_of: int = 1) -> list[slice]:
    """Slices of axes of these sizes, which take at least one in so many positions, evenly spaced.

    Along the last of several positions they take a multiple of this number, if there are enough.
    """
    last = last_of_several(sizes)
    slices = []
    for axis, size in enumerate(sizes):
        without_later = one_in
        for later_size in sizes[axis + 1 : last + 1]:
            taken = _evenly_spaced(later_size, LATER_STRIDE, devices)
            without_later = _one_in_of_others(without_later, later_size, taken)
        taken = _evenly_spaced(size, without_later, devices, multiple_of if axis == last else 1)
        one_in = _one_in_of_others(one_in, size, taken)
        slices.append(taken)
    return slices


def last_of_several(sizes: Sequence[Any]) -> int:
    """The last axis of at least 3 positions, or if none has as many, the last."""
    several = [axis for axis, size in enumerate(sizes) if not (isinstance(size, int) and size < 3)]
    return max(several, default=len(sizes) - 1)


def _one_in_of_others(one_in: int, size: Any, taken: slice) -> int:
    """One in how many positions of the other axes is enough, once so many of this one are taken."""
    # A step that does not divide the size takes fewer than one position a step.
    known = isinstance(size, int)
    return max(1, one_in * len(range(size)[taken]) // size if known else one_in // taken.step)


def _evenly_spaced(size: Any, one_in: int, devices: int, multiple_of: int = 1) -> slice:
    """At least one in so many of an axis; on one device, as far from one end as from the other."""
    if not isinstance(size, int):
        return slice(0, size, one_in)  # A symbolic size is not known to be small.
    if devices == 1:
        number = math.ceil(size / one_in)
        multiple = math.ceil(number / multiple_of) * multiple_of
        number = multiple if multiple <= size else number
        stride = _stride_of(size, number)
        start = (size - 1 - (number - 1) * stride) // 2
        return slice(start, start + (number - 1) * stride + 1, stride)
    # From the first on, strides that divide what each device has move nothing between devices.
    on_each = size // math.gcd(size, devices)
    stride = max(stride for stride in divisors(on_each) if stride <= one_in)
    return slice(0, size, size if size <= one_in else stride)


def _stride_of(size: int, number: int) -> int:
    """How far apart so many positions of an axis are, for the sample to take all phases alike.

    Of what repeats every 2, 4, 8, … positions, and if such a stride is near, of every 3, 6, 12, ….
    Small strides stay as they are: they miss few phases.
    """
    stride = size // number
    largest = (size - 1 - stride // 2) // max(1, number - 1)
    near = [s for s in (stride, stride + 1, stride - 1) if 5 <= s <= largest]
    return min(near, key=lambda s: (s % 2 == 0, s % 3 == 0), default=stride)
