"""Group normalization's parameters to and from other frameworks, none of which need be installed.

| framework            | scale    | bias     |
| -------------------- | -------- | -------- |
| flax, jgn            | `scale`  | `bias`   |
| torch, lucid         | `weight` | `bias`   |
| equinox              | `weight` | `bias`   |
| haiku                | `scale`  | `offset` |
| keras                | `gamma`  | `beta`   |
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from jgn._axes import num_groups_from
from jgn._linen import GroupNorm


class Names(NamedTuple):
    """What a framework calls the two parameters."""

    scale: str
    bias: str


NAMES = {
    "flax": Names("scale", "bias"),
    "jgn": Names("scale", "bias"),
    "torch": Names("weight", "bias"),
    "lucid": Names("weight", "bias"),
    "equinox": Names("weight", "bias"),
    "haiku": Names("scale", "offset"),
    "keras": Names("gamma", "beta"),
}

Path = tuple[Any, ...]


def convert_params(
    params: Any,
    *,
    source: str,
    target: str,
    where: Callable[[Path], bool] = lambda path: True,
) -> Any:
    """Renames the parameters of every group normalization in a tree of mappings and sequences.

    A mapping counts as a normalization's if it has nothing but a scale, or a scale and a bias, of
    the source's names, each of rank 1 and of equal size: a convolution's or a dense layer's kernel
    has a higher rank. A lone bias could be anything's and stays. Other normalizations look the
    same; `where` tells them apart.

    Args:
        params: Mappings, lists and tuples, with arrays of any kind as leaves.
        source: Whose names it has: flax, jgn, torch, lucid, equinox, haiku or keras.
        target: Whose names to give.
        where: Whether to convert at this path, the keys and indices from the root.

    Returns:
        The same tree with new names. Every leaf is the same object.

    Raises:
        ValueError: source or target is unknown.

    Example:
        >>> import numpy as np
        >>> from jgn.interop import convert_params
        >>> convert_params(
        ...     {"norm": {"weight": np.ones(2), "bias": np.zeros(2)}}, source="torch", target="flax"
        ... )
        {'norm': {'scale': array([1., 1.]), 'bias': array([0., 0.])}}
    """
    old, new = _names("source", source), _names("target", target)
    renamed = {old.scale: new.scale, old.bias: new.bias}

    def convert(node: Any, path: Path) -> Any:
        if isinstance(node, Mapping):
            if _is_normalization(node, old) and where(path):
                return _like(node, {renamed[name]: value for name, value in node.items()})
            return _like(node, {name: convert(node[name], (*path, name)) for name in node})
        if isinstance(node, list | tuple):
            converted = [convert(value, (*path, index)) for index, value in enumerate(node)]
            is_named = hasattr(node, "_fields")
            return type(node)(*converted) if is_named else type(node)(converted)
        return node

    return convert(params, ())


def from_torch(module: Any) -> tuple[GroupNorm, dict[str, Any]]:
    """Makes a `jgn.GroupNorm` and its variables from a `torch.nn.GroupNorm` or its like.

    Args:
        module: Anything with `num_groups`, `num_channels`, `eps`, `affine`, `weight` and `bias`.

    Returns:
        The layer, with its channels along axis 1 and the module's epsilon, and its variables, bit
        for bit those of the module.

    Raises:
        TypeError: module lacks one of the attributes.
    """
    missing = [name for name in _ATTRIBUTES if not hasattr(module, name)]
    if missing:
        raise TypeError(
            f"module must have the attributes of torch.nn.GroupNorm: got a {type(module).__name__} "
            f"without {', '.join(missing)}."
        )
    layer = GroupNorm(
        num_groups=module.num_groups,
        epsilon=module.eps,
        channel_axis=1,
        use_scale=module.weight is not None,
        use_bias=module.bias is not None,
    )
    parameters = {
        name: _to_jax(value)
        for name, value in (("scale", module.weight), ("bias", module.bias))
        if value is not None
    }
    dtypes = {value.dtype for value in parameters.values()}
    if len(dtypes) == 1:
        layer = layer.clone(param_dtype=dtypes.pop())
    return layer, {"params": parameters} if parameters else {}


_ATTRIBUTES = ("num_groups", "num_channels", "eps", "affine", "weight", "bias")


def to_torch(
    layer: GroupNorm, variables: Mapping[str, Any], num_channels: int | None = None
) -> Any:
    """Makes a `torch.nn.GroupNorm` from a `jgn.GroupNorm` and its variables.

    Args:
        layer: The layer. Its channels come to lie along axis 1, where torch has them.
        variables: As `layer.init` returns them.
        num_channels: Needed by a layer without parameters, which does not know.

    Returns:
        The module, its parameters bit for bit those of the layer.

    Raises:
        ImportError: torch is not installed.
        ValueError: the layer does what torch's does not, or num_channels is missing.
    """
    for name, default in (
        ("activation", None),
        ("axis_name", None),
        ("reduction_axes", None),
        ("dtype", None),
    ):
        if getattr(layer, name) != default:
            raise ValueError(
                f"torch.nn.GroupNorm has no {name}: got {name}={getattr(layer, name)!r}."
            )
    torch = importlib.import_module("torch")
    parameters = variables.get("params", {})
    sizes = [parameter.size for parameter in parameters.values()]
    channels = sizes[0] if sizes else num_channels
    if channels is None:
        raise ValueError("num_channels must be given for a layer without parameters: got None.")
    module = torch.nn.GroupNorm(
        num_groups_from(layer.num_groups, layer.group_size, channels),
        channels,
        eps=layer.epsilon,
        affine=bool(parameters),
    )
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        value = parameters.get(ours)
        parameter = None
        if value is not None:
            parameter = torch.nn.Parameter(_to_torch(torch, np.asarray(value)))
        module.register_parameter(theirs, parameter)
    return module


def _names(argument: str, framework: str) -> Names:
    if framework not in NAMES:
        raise ValueError(f"{argument} must be one of {', '.join(NAMES)}: got {framework!r}.")
    return NAMES[framework]


def _is_normalization(node: Mapping[Any, Any], names: Names) -> bool:
    shapes = {tuple(getattr(value, "shape", (None, None))) for value in node.values()}
    return (
        names.scale in node
        and set(node) <= set(names)
        and len(shapes) == 1
        and len(shapes.pop()) == 1
    )


def _like(node: Mapping[Any, Any], content: dict[Any, Any]) -> Any:
    return content if type(node) is dict else type(node)(content)  # pyright: ignore[reportCallIssue]


def _to_jax(value: Any) -> Array:
    """A tensor of torch, or anything that NumPy takes."""
    if not hasattr(value, "detach"):
        return jnp.array(value)
    tensor = value.detach().cpu()
    # NumPy has no bfloat16 of its own; float32 holds each exactly.
    if str(tensor.dtype) == "torch.bfloat16":
        return jnp.array(tensor.float().numpy(), jnp.bfloat16)
    return jnp.array(tensor.numpy())


def _to_torch(torch: Any, array: np.ndarray) -> Any:
    if array.dtype == jnp.bfloat16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    return torch.from_numpy(array.copy())
