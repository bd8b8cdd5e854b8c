"""Group normalization for JAX and Flax.

>>> import jax, jgn
>>> x = jax.random.normal(jax.random.key(0), (8, 32, 32, 64))
>>> y = jgn.group_norm(x, num_groups=8)                          # a function
>>> layer = jgn.GroupNorm(num_groups=8, activation=jax.nn.silu)  # a flax.linen layer
"""

from jgn._group_norm import group_norm
from jgn._linen import GroupNorm

__all__ = ["GroupNorm", "group_norm"]
__version__ = "0.1.0"
