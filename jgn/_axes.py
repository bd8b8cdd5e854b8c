"""Which axes of x are batch, spatial and channel, and how its channels form groups."""

import math
import operator
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeGuard

from jgn._messages import shown


class Axes(NamedTuple):
    """The role of every axis of x; together they are all its axes, none of them negative."""

    batch: tuple[int, ...]
    spatial: tuple[int, ...]
    channel: int

    def split(self, axis: int) -> "Axes":
        """Those of x once a spatial axis is split in two, the first of which is a batch axis."""

        def moved(other: int) -> int:
            return other + (other >= axis)

        return Axes(
            batch=tuple(sorted([axis, *map(moved, self.batch)])),
            spatial=tuple(map(moved, self.spatial)),
            channel=moved(self.channel),
        )


def resolve_axes(
    rank: int, channel_axis: int, reduction_axes: int | Collection[int] | None
) -> Axes:
    """Names the batch, spatial and channel axes of an array of this rank.

    Raises:
        ValueError: an axis is out of range or repeated, or the channel axis is not reduced.
        TypeError: an axis is not an integer.
    """
    if rank == 0:
        raise ValueError("x must have a channel axis: got a scalar; its rank must be 1 or more.")
    channel = _resolve_axis(rank, channel_axis, "channel_axis")
    if reduction_axes is None:
        reduced = [axis for axis in range(rank) if axis > 0 or axis == channel]
    else:
        reduced = _resolve_reduction_axes(rank, reduction_axes)
        if channel not in reduced:
            raise ValueError(
                "reduction_axes must contain the channel axis: "
                f"got reduction_axes={reduction_axes} with channel_axis={channel_axis}."
            )
    return Axes(
        batch=tuple(axis for axis in range(rank) if axis not in reduced),
        spatial=tuple(axis for axis in reduced if axis != channel),
        channel=channel,
    )


def check_num_groups(num_groups: Any, channels: int, hint: str = "") -> int:
    """Returns num_groups if it divides the channels; a hint ends the message if not."""
    return _checked_divisor(num_groups, "num_groups", channels, hint)


def num_groups_from(num_groups: Any, group_size: Any, channels: int, hint: str = "") -> int:
    """Returns the number of groups, given by count or by size, if it divides the channels."""
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            "exactly one of num_groups and group_size must be given: "
            f"got num_groups={shown(num_groups)} and group_size={shown(group_size)}; "
            f"to give the size, write num_groups=None, group_size=... instead{hint}."
        )
    if group_size is None:
        return check_num_groups(num_groups, channels, hint)
    return channels // _checked_divisor(group_size, "group_size", channels, hint)


def channels_of_x(shape: Sequence[int], axes: Axes) -> str:
    """A hint at where the number of channels comes from."""
    return f"; the channels are axis {axes.channel} of x, shape {shape}: see channel_axis"


def _checked_divisor(value: Any, name: str, channels: Any, hint: str) -> int:
    divisor = positive_integer(value, name)
    if not isinstance(channels, int):
        raise ValueError(
            f"the number of channels must be known when the call is traced: got {channels}; other "
            "sizes may be symbolic."
        )
    if channels % divisor:
        raise ValueError(
            f"{name} must divide the channels: got {name}={divisor} for {channels} channels; "
            f"the nearest that do are {_nearest_divisors(channels, divisor)} "
            f"(num_groups × group_size: {_factorizations(channels)}){hint}."
        )
    return divisor


def _resolve_axis(rank: int, axis: Any, name: str, wanted: str = "an integer") -> int:
    try:
        index = _as_integer(axis)
    except TypeError:
        raise TypeError(f"{name} must be {wanted}: got {shown(axis)}.") from None
    if not -rank <= index < rank:
        raise ValueError(
            f"{name} must lie in [{-rank}, {rank}) for an x of rank {rank}: got {index}."
        )
    return index % rank


def _resolve_reduction_axes(rank: int, reduction_axes: int | Collection[int]) -> list[int]:
    axes = reduction_axes if has_elements(reduction_axes) else (reduction_axes,)
    wanted = "one or more integers"
    reduced = sorted(_resolve_axis(rank, axis, "reduction_axes", wanted) for axis in axes)
    if len(set(reduced)) < len(reduced):
        raise ValueError(
            f"reduction_axes must not repeat an axis: got {reduction_axes} for an x of rank {rank}."
        )
    return reduced


def positive_integer(value: Any, name: str) -> int:
    try:
        number = _as_integer(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an integer known when the call is traced: got {shown(value)}."
        ) from None
    if number < 1:
        raise ValueError(f"{name} must be 1 or more: got {number}.")
    return number


def _as_integer(value: Any) -> int:
    if isinstance(value, bool):  # To Python, True is 1.
        raise TypeError
    return operator.index(value)


def has_elements(value: Any) -> TypeGuard[Collection[Any]]:
    """Whether it is a collection, but neither text nor an array of rank 0."""
    is_collection = isinstance(value, Collection) and not isinstance(value, str | bytes)
    return is_collection and getattr(value, "ndim", 1) > 0


def divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _nearest_divisors(channels: int, number: int) -> str:
    below = [divisor for divisor in divisors(channels) if divisor < number][-1:]
    above = [divisor for divisor in divisors(channels) if divisor > number][:1]
    return " and ".join(str(divisor) for divisor in below + above)


def _factorizations(channels: int) -> str:
    return ", ".join(f"{divisor} × {channels // divisor}" for divisor in divisors(channels))
