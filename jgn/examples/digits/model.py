"""A small residual convolutional network whose normalization can be chosen."""

import flax.linen as nn
from jax import Array
from jaxtyping import Float

import jgn

NORMS = ("group", "layer", "instance", "batch", "none")


class Normalized(nn.Module):
    """SiLU after the normalization that `norm` names: one of NORMS."""

    norm: str
    groups: int | None
    group_size: int | None

    @nn.compact
    def __call__(self, x: Float[Array, "batch *spatial channels"], train: bool) -> Array:
        match self.norm:
            case "group":
                return jgn.GroupNorm(self.groups, self.group_size, activation=nn.silu)(x)
            case "layer":
                return jgn.GroupNorm(num_groups=1, activation=nn.silu)(x)
            case "instance":
                return jgn.GroupNorm(num_groups=None, group_size=1, activation=nn.silu)(x)
            case "batch":
                return nn.silu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            case "none":
                return nn.silu(x)
            case _:
                raise ValueError(f"norm must be one of {', '.join(NORMS)}: got {self.norm!r}.")


class Network(nn.Module):
    """A convolution and three residual blocks, the second of half the height and width."""

    norm: str = "group"
    groups: int | None = 8
    group_size: int | None = None
    channels: int = 32
    classes: int = 10

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width 1"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        x = nn.Conv(self.channels, (3, 3))(x)
        for channels, stride in (
            (self.channels, 1),
            (2 * self.channels, 2),
            (2 * self.channels, 1),
        ):
            x = self._block(x, channels, stride, train)
        x = self._normalized(x, train)
        return nn.Dense(self.classes)(x.mean((1, 2)))

    def _normalized(self, x: Array, train: bool) -> Array:
        return Normalized(self.norm, self.groups, self.group_size)(x, train)

    def _block(self, x: Array, channels: int, stride: int, train: bool) -> Array:
        residual = self._normalized(x, train)
        residual = nn.Conv(channels, (3, 3), stride)(residual)
        residual = self._normalized(residual, train)
        residual = nn.Conv(channels, (3, 3))(residual)
        if residual.shape != x.shape:
            x = nn.Conv(channels, (1, 1), stride)(x)
        return x + residual
