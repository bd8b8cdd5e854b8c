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


@pytest.fixture
def traced_for(monkeypatch):
    """Has the sums traced in the form of a backend, whichever runs them."""
    own = jax.default_backend()

    def choose(backend):
        if backend != jax.default_backend():
            monkeypatch.setattr(jax, "default_backend", lambda: backend)
            jax.clear_caches()  # What is compiled belongs to one of them.

    yield choose
    if jax.default_backend() != own:
        jax.clear_caches()


@pytest.fixture(params=["cpu", "gpu"])
def backend(request, traced_for):
    """Either form; other backends have the GPU's without parts."""
    traced_for(request.param)
