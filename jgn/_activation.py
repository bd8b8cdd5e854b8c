"""An activation in two parts: its arrays, which are traced, and the rest, which is static."""

import functools
import types
from collections.abc import Callable
from numbers import Number
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.tree_util import Partial

from jgn._messages import shown


class ActivationWithoutArrays(NamedTuple):
    """A pytree's structure, and those of its leaves that are no arrays; a function is one leaf.

    To Python True is equal to 1, 2 to 2.0 and 0.0 to -0.0; spelled out, they are not.
    """

    structure: Any
    leaves: tuple[Any, ...]
    numbers: tuple[str, ...]

    def with_arrays(self, arrays: list[Array | None]) -> Callable[[Array], Array] | None:
        leaves = zip(arrays, self.leaves, strict=True)
        return jax.tree.unflatten(self.structure, [b if a is None else a for a, b in leaves])


def split_activation(activation: Any) -> tuple[list[Array | None], ActivationWithoutArrays]:
    """The arrays of an activation, with None for its other leaves, and what is left of it.

    Raises:
        TypeError: activation is neither None nor callable, or what is left of it has no hash.
    """
    if activation is not None and not callable(activation):
        raise TypeError(f"activation must be callable: got {shown(activation)}.")
    leaves, structure = jax.tree.flatten(as_pytree(activation))
    are_arrays = [isinstance(leaf, Array | np.ndarray) for leaf in leaves]
    arrays = [a if is_one else None for a, is_one in zip(leaves, are_arrays, strict=True)]
    others = [None if is_one else b for b, is_one in zip(leaves, are_arrays, strict=True)]
    numbers = tuple(repr(leaf) for leaf in others if isinstance(leaf, Number))
    without_arrays = ActivationWithoutArrays(structure, tuple(others), numbers)
    try:
        hash(without_arrays)
    except TypeError:
        raise TypeError(
            "activation must be hashable, apart from its arrays, as it is part of jax.jit's cache "
            f"key: got {type(activation).__name__}; call it on the result instead."
        ) from None
    return arrays, without_arrays


def as_pytree(activation: Any) -> Any:
    """Makes a pytree of a method of one, and of a `functools.partial`, so that arrays are seen."""
    function, args, keywords = activation, (), {}
    if isinstance(activation, functools.partial):
        function, args, keywords = activation.func, activation.args, activation.keywords
    is_method = isinstance(function, types.MethodType)
    if is_method and not jax.tree_util.all_leaves([function.__self__]):
        function, args = function.__func__, (function.__self__, *args)
    return activation if function is activation else Partial(function, *args, **keywords)
