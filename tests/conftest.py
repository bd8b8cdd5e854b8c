"""Configures JAX before any test can start its backend, and keras before any can import it."""

import os

import jax
import pytest

# Promotions that nobody asked for are errors here; users have both settings.
jax.config.update("jax_numpy_dtype_promotion", "strict")
# Where only a CPU is there, it stands for the eight devices of the sharding tests.
jax.config.update("jax_num_cpu_devices", 8)
# Accelerators would round what convolutions and matrix products of test networks are made of.
jax.config.update("jax_default_matmul_precision", "highest")
# keras, where it is installed, would look for tensorflow.
os.environ["KERAS_BACKEND"] = "jax"


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, monkeypatch):
    """The backend whose form of the sums is traced, whichever runs it.

    The form of meshes and of all other backends is the GPU's without parts of positions.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: request.param)
    jax.clear_caches()  # What is compiled belongs to one of them.
    yield request.param
    jax.clear_caches()
