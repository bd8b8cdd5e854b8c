"""Configures JAX before any test can start its backend, and keras before any can import it."""

import os

import jax

# Promotions that nobody asked for are errors here; users have both settings.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Where only a CPU is there, it stands for the eight devices of the sharding tests.
jax.config.update("jax_num_cpu_devices", 8)
# keras, where it is installed, would look for tensorflow.
os.environ["KERAS_BACKEND"] = "jax"
