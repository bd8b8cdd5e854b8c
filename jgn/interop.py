"""Parameters to and from other frameworks, none of which needs to be installed.

>>> import numpy as np
>>> from jgn.interop import convert_params
>>> ours = {"norm": {"scale": np.ones(8), "bias": np.zeros(8)}}
>>> list(convert_params(ours, source="jgn", target="keras")["norm"])
['gamma', 'beta']
"""

import copy
import importlib
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta

from jgn._axes import check_num_groups, num_groups_from, positive_integer
from jgn._group_norm import checked_epsilon
from jgn._linen import GroupNorm
from jgn._messages import shown

Framework = Literal["jgn", "flax", "torch", "lucid", "equinox", "haiku", "keras"]

# What each calls the factors and the offsets.
_SPELLINGS = {
    "jgn": ("scale", "bias"),
    "flax": ("scale", "bias"),
    "torch": ("weight", "bias"),
    "lucid": ("weight", "bias"),
    "equinox": ("weight", "bias"),
    "haiku": ("scale", "offset"),
    "keras": ("gamma", "beta"),
}

# What a tree is made of; all else is a leaf.
_CONTAINERS = (Mapping, list, tuple)

_ATTRIBUTES_OF_TORCH = ("num_groups", "num_channels", "eps", "affine", "weight", "bias")


def from_torch(module: Any) -> tuple[GroupNorm, dict[str, dict[str, np.ndarray]]]:
    """Makes the layer that computes what a `torch.nn.GroupNorm` does.

    Args:
        module: A `torch.nn.GroupNorm`, or any object with its attributes `num_groups`,
            `num_channels`, `eps`, `affine`, `weight` and `bias`, such as lucid's.

    Returns:
        The layer, with the channels on axis 1 as in torch, and its variables: copies of the
        module's parameters, bit for bit and in their own dtype, as NumPy arrays.

    Raises:
        TypeError: the module lacks one of the attributes, its parameters or its `eps` are not
            numbers, or a count is not an integer.
        ValueError: the groups do not divide the channels, a count is less than 1, a parameter has
            another shape, or `eps` is negative or not finite.

    Example:
        >>> import types
        >>> import jax, numpy as np
        >>> from jgn.interop import from_torch
        >>> module = types.SimpleNamespace(      # stands for torch.nn.GroupNorm(2, 8)
        ...     num_groups=2, num_channels=8, eps=1e-5, affine=True,
        ...     weight=np.ones(8, np.float32), bias=np.zeros(8, np.float32))
        >>> layer, variables = from_torch(module)
        >>> layer.apply(variables, jax.numpy.ones((1, 8, 3, 3))).shape
        (1, 8, 3, 3)
    """
    missing = [name for name in _ATTRIBUTES_OF_TORCH if not hasattr(module, name)]
    if missing:
        raise TypeError(
            "module must have the attributes of torch.nn.GroupNorm: "
            f"got a {type(module).__name__} without {', '.join(missing)}."
        )
    tensors = {"scale": module.weight, "bias": module.bias} if module.affine else {}
    params = {name: _array(tensor, name) for name, tensor in tensors.items() if tensor is not None}
    num_channels = positive_integer(module.num_channels, "num_channels")
    for name, values in params.items():
        if values.shape != (num_channels,):
            raise ValueError(
                f"{name} must have shape ({num_channels},), one value a channel: "
                f"got {values.shape}."
            )
    layer = GroupNorm(
        num_groups=check_num_groups(module.num_groups, num_channels),
        epsilon=checked_epsilon(module.eps),
        param_dtype=next((values.dtype for values in params.values()), np.dtype(np.float32)),
        use_scale="scale" in params,
        use_bias="bias" in params,
        channel_axis=1,
    )
    return layer, {"params": params} if params else {}


def to_torch(
    layer: GroupNorm, variables: Mapping[str, Any], *, num_channels: int | None = None
) -> Any:
    """Makes the `torch.nn.GroupNorm` that computes what the layer does.

    Args:
        layer: The layer. torch's channels are on axis 1, wherever the layer's are.
        variables: The layer's variables; they are copied bit for bit, in their own dtype.
        num_channels: How many channels x has; only needed for a layer without parameters.

    Returns:
        A `torch.nn.GroupNorm` on the CPU.

    Raises:
        ImportError: torch is not installed.
        ValueError: the layer has an option that torch's has not; the variables are not the
            layer's; the channels are unknown, or not a multiple of the groups; epsilon is negative
            or not finite.
        TypeError: layer is not a `jgn.GroupNorm`; `num_channels` is not an integer; a parameter is
            not floating or complex; epsilon is not a number.
    """
    if not isinstance(layer, GroupNorm):
        raise TypeError(
            f"layer must be a jgn.GroupNorm: got {type(layer).__module__}.{type(layer).__name__}; "
            "write jgn.GroupNorm(...) with its groups and its epsilon."
        )
    for option in ("dtype", "reduction_axes", "axis_name", "axis_index_groups", "activation"):
        value = getattr(layer, option)
        if value is not None:
            raise ValueError(
                f"layer must have no {option}, as torch.nn.GroupNorm has none: got {shown(value)}; "
                f"write layer.clone({option}=None), and do in torch what it did."
            )
    variables = meta.unbox(variables)
    params = variables.get("params", {}) if isinstance(variables, Mapping) else None
    learned = {"scale": layer.use_scale, "bias": layer.use_bias}
    wanted = [name for name, is_learned in learned.items() if is_learned]
    if not isinstance(params, Mapping) or sorted(params) != sorted(wanted):
        raise ValueError(
            f'variables must hold the layer\'s parameters, {{"params": {wanted}}}: '
            f"got {shown(jax.tree.map(np.shape, variables))}."
        )
    arrays = {name: _array(params[name], name) for name in wanted}
    for name, values in arrays.items():
        if not jnp.issubdtype(values.dtype, jnp.inexact):
            raise TypeError(f"{name} must be floating or complex: got {values.dtype}.")
    shapes = {values.shape for values in arrays.values()}
    if num_channels is not None:
        shapes.add((positive_integer(num_channels, "num_channels"),))
    if len(shapes) != 1 or len(next(iter(shapes))) != 1:
        raise ValueError(
            "the number of channels must be known from the parameters, each of shape (channels,), "
            "or from num_channels for a layer without any: "
            f"got {num_channels=} and the parameters' shapes "
            f"{ {name: values.shape for name, values in arrays.items()} }."
        )
    ((channels,),) = shapes
    num_groups = num_groups_from(layer.num_groups, layer.group_size, channels)
    epsilon = checked_epsilon(layer.epsilon)
    try:
        torch = importlib.import_module("torch")
    except ImportError as error:
        raise ImportError(
            "to_torch needs torch, which cannot be imported; "
            'convert_params(params, source="jgn", target="torch") does not.'
        ) from error
    module = torch.nn.GroupNorm(num_groups, channels, epsilon, affine=False)
    module.affine = bool(arrays)
    for name, values in arrays.items():
        # Through bytes, because torch knows no bfloat16 of NumPy's.
        tensor = torch.frombuffer(
            bytearray(values.tobytes()), dtype=getattr(torch, values.dtype.name)
        )
        setattr(module, {"scale": "weight"}.get(name, name), torch.nn.Parameter(tensor))
    return module


def convert_params(
    params: Any,
    *,
    source: Framework,
    target: Framework,
    where: Callable[[tuple[Any, ...]], bool] | None = None,
) -> Any:
    """Renames the parameters of every group normalization in a tree.

    | framework             | scale    | bias     |
    | --------------------- | -------- | -------- |
    | jgn, flax             | `scale`  | `bias`   |
    | torch, lucid, equinox | `weight` | `bias`   |
    | haiku                 | `scale`  | `offset` |
    | keras                 | `gamma`  | `beta`   |

    Other layers use these names too: a convolution of torch's has a `weight` and a `bias`. A
    normalization is told from them by having nothing but both, of one shape, or nothing but a scale
    of rank 1; the weight of a convolution or a linear layer has more axes than its bias. Both are
    known when `vmap` or `scan` stacked them, too; a stacked scale alone is not. A bias alone could
    be anything's, and stays, unless `where` chooses it. Layer normalizations look the same, and are
    renamed the same in all these frameworks. So do torch's PReLU, its batch normalization without
    the running statistics, and flax's WeightNorm: a tree that has these needs `where`.

    Args:
        params: Mappings, lists and tuples, nested; names may be joined by "." or "/" into one, as
            in a `state_dict`, or stand in a tuple, as `flatten_dict` leaves them. All else is a
            leaf.
        source: Whose names the tree has.
        target: Whose names to give it.
        where: Chooses the nodes to rename among all whose names are of the source's two, in place
            of the rule above. It is called with the node's path, a tuple of keys and indices; for
            joined names, the last of them is what stands before the last "." or "/"; a tuple's
            names follow one by one.

    Returns:
        A tree of the same containers and of the very same leaves. No value is changed: neither
        layout nor epsilon, whose default differs between frameworks, is among the parameters. If
        no node has the source's names, the tree is as it was.

    Raises:
        ValueError: source or target is unknown.

    Example:
        >>> import numpy as np
        >>> from jgn.interop import convert_params
        >>> state_dict = {
        ...     "0.weight": np.ones((8, 3, 3, 3)), "0.bias": np.zeros(8),     # a convolution
        ...     "1.weight": np.ones(8), "1.bias": np.zeros(8)}                # its normalization
        >>> list(convert_params(state_dict, source="torch", target="haiku"))
        ['0.weight', '0.bias', '1.scale', '1.offset']
        >>> params = {"conv": {"bias": np.zeros(8)}, "norm": {"bias": np.zeros(8)}}
        >>> convert_params(params, source="jgn", target="keras", where=lambda path: "norm" in path)
        {'conv': {'bias': array([...])}, 'norm': {'beta': array([...])}}
    """
    names = dict(zip(_spelling(source, "source"), _spelling(target, "target"), strict=True))

    def converted(tree: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(tree, Mapping):
            new_keys = _new_keys(tree, path, names, where)
            items = {
                new_keys.get(key, key): converted(value, (*path, key))
                for key, value in tree.items()
            }
            return _mapping_like(tree, items)
        if isinstance(tree, list | tuple):
            children = [converted(child, (*path, index)) for index, child in enumerate(tree)]
            return type(tree)(*children) if hasattr(tree, "_fields") else type(tree)(children)
        return tree

    return converted(params, ())


def _spelling(framework: Any, argument: str) -> tuple[str, str]:
    if framework not in list(_SPELLINGS):
        known = ", ".join(_SPELLINGS)
        raise ValueError(f"{argument} must be one of {known}: got {shown(framework)}.")
    return _SPELLINGS[framework]


def _new_keys(
    tree: Mapping[Any, Any],
    path: tuple[Any, ...],
    names: dict[str, str],
    where: Callable[[tuple[Any, ...]], bool] | None,
) -> dict[Any, Any]:
    """The keys to rename in one mapping, each with what it becomes."""
    nodes: dict[Any, dict[Any, Any]] = {}
    for key in tree:
        prefix, name = _split(key)
        nodes.setdefault(prefix, {})[name] = key

    def is_chosen(prefix: Any, keys: dict[Any, Any]) -> bool:
        values = [tree[key] for key in keys.values()]
        if not keys.keys() <= names.keys() or any(isinstance(v, _CONTAINERS) for v in values):
            return False
        if where is not None:
            names_before = prefix if isinstance(prefix, tuple) else filter(None, [prefix[:-1]])
            return where((*path, *names_before))
        shapes = {getattr(meta.unbox(value), "shape", None) for value in values}
        if len(keys) == 2:
            return len(shapes) == 1 and shapes != {None}
        scale, _ = names
        (shape,) = shapes
        return scale in keys and len(shape or ()) == 1

    return {
        key: (*prefix, names[name]) if isinstance(prefix, tuple) else prefix + names[name]
        for prefix, keys in nodes.items()
        if is_chosen(prefix, keys)
        for name, key in keys.items()
    }


def _split(key: Any) -> tuple[Any, Any]:
    """What stands before the name of a parameter, and the name."""
    if isinstance(key, tuple) and key:
        return key[:-1], key[-1]
    if not isinstance(key, str):
        return None, key
    prefix = re.sub(r"[^./]*\Z", "", key)
    return prefix, key.removeprefix(prefix)


def _mapping_like(tree: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    if isinstance(tree, dict):
        # A defaultdict's constructor differs, and a state_dict of torch's carries its versions.
        copied = copy.copy(tree)
        copied.clear()
        copied.update(items)
        return copied
    rebuild: Any = type(tree)
    return rebuild(items)


def _array(value: Any, name: str) -> np.ndarray:
    """A copy in host memory of any framework's array."""
    for method in ("detach", "cpu", "contiguous"):  # torch's, on the way to NumPy
        if hasattr(value, method):
            value = getattr(value, method)()
    try:
        array = value.numpy() if hasattr(value, "numpy") else np.asarray(value)
    except TypeError:  # torch's bfloat16, which NumPy itself does not know
        array = np.asarray(jax.dlpack.from_dlpack(value))
    if not jnp.issubdtype(array.dtype, jnp.number):
        raise TypeError(f"{name} must be an array of numbers: got {shown(value)}.")
    return array.astype(array.dtype.newbyteorder("="))
