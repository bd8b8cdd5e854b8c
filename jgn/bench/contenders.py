"""The implementations that are compared, each behind the same few methods."""

import contextlib
import importlib
import importlib.util
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Protocol

import ml_dtypes  # noqa: F401  (NumPy knows bfloat16 by its name once this is imported.)
import numpy as np

from jgn.bench.workloads import Workload

EPSILON = 1e-5
FORWARD, BOTH = "forward", "forward and backward"
COMPILED = "torch-compiled"
PROFILED_CALLS = 10
FLOORS = ("copy", "sum", "sum of squares", "multiply-add")

# The package that each contender needs.
PACKAGES = {
    "jgn": "jgn",
    "flax": "flax",
    "haiku": "haiku",
    "equinox": "equinox",
    "torch": "torch",
    COMPILED: "torch",
}
PEERS = tuple(name for name in PACKAGES if name != "jgn")


class Contender(Protocol):
    """What can be timed of one workload."""

    calls: dict[str, Callable[[], Any]]

    def kernels(self, work: Callable[[], Any]) -> list[tuple[float, float]]:
        """What the work has a GPU do: start and duration of every kernel and copy, in seconds."""
        ...


class Implementation(Contender, Protocol):
    """One of group normalization."""

    def output(self) -> np.ndarray: ...
    def facts(self) -> dict[str, Any]: ...


def is_installed(name: str) -> bool:
    """Whether the package of this contender can be imported."""
    return importlib.util.find_spec(PACKAGES[name]) is not None


def make(
    name: str, workload: Workload, dtype: str, seed: int, platform: str
) -> "Implementation | Floor":
    """The contender of this name, its inputs on JAX's device, whose platform is given."""
    if name == "floor":
        return Floor(workload, dtype, seed)
    if name.startswith("torch"):
        return Torch(workload, dtype, seed, platform, compiled=name == COMPILED)
    return Jax(name, workload, dtype, seed)


def reference(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, workload: Workload) -> np.ndarray:
    """y in float64, from the equation."""
    first = np.moveaxis(x.astype(np.float64), workload.channel_axis, 1)
    groups = first.reshape(len(first), workload.num_groups, -1)
    mean, variance = groups.mean(-1, keepdims=True), groups.var(-1, keepdims=True)
    y = ((groups - mean) / np.sqrt(variance + EPSILON)).reshape(first.shape)
    per_channel = (-1, *(1,) * (first.ndim - 2))
    y = y * scale.reshape(per_channel) + bias.reshape(per_channel)
    return np.moveaxis(y, 1, workload.channel_axis)


def _jgn(workload, activation=None):
    import jgn

    def normalized(x, scale, bias):
        return jgn.group_norm(
            x,
            workload.num_groups,
            scale,
            bias,
            channel_axis=workload.channel_axis,
            epsilon=EPSILON,
            activation=activation,
        )

    return normalized


def _channels_last(workload, normalized_last):
    """flax and haiku as their users call them where the channels are not last."""
    import jax.numpy as jnp

    def normalized(x, scale, bias):
        y = normalized_last(jnp.moveaxis(x, workload.channel_axis, -1), scale, bias)
        return jnp.moveaxis(y, -1, workload.channel_axis)

    return normalized


def _flax(workload):
    import flax.linen as nn

    layer = nn.GroupNorm(workload.num_groups, epsilon=EPSILON)

    def normalized(x, scale, bias):
        return layer.apply({"params": {"scale": scale, "bias": bias}}, x).astype(x.dtype)  # pyright: ignore[reportAttributeAccessIssue]

    return _channels_last(workload, normalized)


def _haiku(workload):
    hk = importlib.import_module("haiku")
    function = hk.without_apply_rng(
        hk.transform(lambda x: hk.GroupNorm(workload.num_groups, eps=EPSILON)(x))
    )

    def normalized(x, scale, bias):
        return function.apply({"group_norm": {"scale": scale, "offset": bias}}, x).astype(x.dtype)

    return _channels_last(workload, normalized)


def _equinox(workload):
    import jax
    import jax.numpy as jnp

    eqx = importlib.import_module("equinox")
    empty = eqx.nn.GroupNorm(workload.num_groups, workload.channels, eps=EPSILON)

    def normalized(x, scale, bias):
        layer = eqx.tree_at(lambda layer: (layer.weight, layer.bias), empty, (scale, bias))
        first = jnp.moveaxis(x, workload.channel_axis, 1)
        return jnp.moveaxis(jax.vmap(layer)(first), 1, workload.channel_axis).astype(x.dtype)

    return normalized


_JAX = {"jgn": _jgn, "flax": _flax, "haiku": _haiku, "equinox": _equinox}


class OfJax:
    """What is compiled by JAX."""

    def kernels(self, work: Callable[[], Any]) -> list[tuple[float, float]]:
        import jax

        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = options.host_tracer_level = 0
        with tempfile.TemporaryDirectory() as directory:
            with jax.profiler.trace(directory, profiler_options=options):
                work()
            (file,) = pathlib.Path(directory).rglob("*.xplane.pb")
            profile = jax.profiler.ProfileData.from_file(str(file))
        return [
            (1e-9 * event.start_ns, 1e-9 * event.duration_ns)
            for plane in profile.planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
        ]


class Jax(OfJax):
    """A function of x, scale and bias, compiled."""

    def __init__(self, name: str, workload: Workload, dtype: str, seed: int):
        import jax

        normalized = _JAX[name](workload)

        def silu_after(x, scale, bias):
            return jax.nn.silu(normalized(x, scale, bias))

        self._with_silu = _jgn(workload, jax.nn.silu) if name == "jgn" else silu_after
        x, scale, bias, cotangent = workload.inputs(seed)
        self._normalized = normalized
        self._inputs = jax.device_put((x.astype(dtype), scale, bias))
        self._cotangent = jax.device_put(cotangent.astype(dtype))

        def both(x, scale, bias, cotangent):
            y, vjp = jax.vjp(normalized, x, scale, bias)
            # In a network the cotangent comes of y. So no kernel can make y and the gradient of x
            # of the same reading of x.
            y, cotangent = jax.lax.optimization_barrier((y, cotangent))
            return y, vjp(cotangent)

        start = time.perf_counter()
        self._both = jax.jit(both).lower(*self._inputs, self._cotangent).compile()
        self._compile_seconds = time.perf_counter() - start
        self._forward = jax.jit(normalized).lower(*self._inputs).compile()
        self.calls = {
            FORWARD: lambda: jax.block_until_ready(self._forward(*self._inputs)),
            BOTH: lambda: jax.block_until_ready(self._both(*self._inputs, self._cotangent)),
        }

    def output(self) -> np.ndarray:
        return np.asarray(self._forward(*self._inputs), np.float32)

    def gradients(self) -> list[np.ndarray]:
        """Those of x, scale and bias."""
        _, gradients = self._both(*self._inputs, self._cotangent)
        return [np.asarray(gradient, np.float32) for gradient in gradients]

    def facts(self) -> dict[str, Any]:
        """How long forward and backward took to trace and compile, the temporary memory of both
        programs in bytes, and what is kept for the backward pass, relative to x's bytes."""
        x = self._inputs[0]
        forward: Any = self._forward.memory_analysis()
        both: Any = self._both.memory_analysis()
        return {
            "compile_seconds": self._compile_seconds,
            "forward_temporary_bytes": forward.temp_size_in_bytes,
            "temporary_bytes": both.temp_size_in_bytes,
            "kept": bytes_kept(self._normalized, *self._inputs) / x.nbytes,
            "kept_with_silu": bytes_kept(self._with_silu, *self._inputs) / x.nbytes,
        }


def bytes_kept(function: Callable[..., Any], *arguments: Any) -> int:
    """What the backward pass closes over: the arrays in the tree that `jax.vjp` returns."""
    import jax

    kept = jax.eval_shape(lambda *arguments: jax.vjp(function, *arguments)[1], *arguments)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))


class Torch:
    """torch.nn.functional.group_norm, each call in whichever memory layout makes it faster."""

    def __init__(self, workload: Workload, dtype: str, seed: int, platform: str, compiled: bool):
        self._torch = torch = importlib.import_module("torch")
        if platform != "cpu" and not torch.cuda.is_available():
            raise RuntimeError(f"torch must have JAX's device, a {platform}: it has a CPU only.")
        self._device = "cpu" if platform == "cpu" else "cuda"
        self._workload = workload
        self._group_norm = torch.nn.functional.group_norm
        if compiled:
            # Else, after a few shapes, torch stops compiling and runs the function as it is.
            torch.compiler.reset()
            self._group_norm = torch.compile(self._group_norm, dynamic=False)

        x, scale, bias, cotangent = workload.inputs(seed)
        kind = getattr(torch, dtype)
        self._scale, self._bias = (
            # Its CUDA kernels want parameters of x's dtype.
            torch.tensor(
                value,
                dtype=torch.float32 if platform == "cpu" else kind,
                device=self._device,
                requires_grad=True,
            )
            for value in (scale, bias)
        )

        def tensor(value, layout):
            first = np.ascontiguousarray(np.moveaxis(value, workload.channel_axis, 1))
            on_device = torch.from_numpy(first).to(self._device, kind)
            return on_device.contiguous(memory_format=getattr(torch, layout))

        layouts = ["contiguous_format"]
        layouts += {4: ["channels_last"], 5: ["channels_last_3d"]}.get(x.ndim, [])
        tensors = {
            layout: (tensor(x, layout).requires_grad_(), tensor(cotangent, layout))
            for layout in layouts
        }

        def fastest(call):
            def best(layout):
                return min(times(lambda: call(*tensors[layout]), 0.05, self, platform))

            return min(tensors, key=best)

        self._layouts = {FORWARD: fastest(self._forward), BOTH: fastest(self._both)}
        for_forward, self._for_both = (tensors[layout] for layout in self._layouts.values())
        self.calls = {
            FORWARD: lambda: self._forward(*for_forward),
            BOTH: lambda: self._both(*self._for_both),
        }

    def _normalized(self, x):
        return self._group_norm(x, self._workload.num_groups, self._scale, self._bias, EPSILON)

    def _forward(self, x, _):
        with self._torch.no_grad():
            y = self._normalized(x)
        self._synchronize()
        return y

    def _both(self, x, cotangent):
        x.grad = self._scale.grad = self._bias.grad = None
        self._normalized(x).backward(cotangent)
        self._synchronize()

    def _synchronize(self):
        if self._device == "cuda":
            self._torch.cuda.synchronize()

    def output(self) -> np.ndarray:
        y = self.calls[FORWARD]().float().cpu().numpy()
        return np.moveaxis(y, 1, self._workload.channel_axis)

    def gradients(self) -> list[np.ndarray]:
        """Those of x, scale and bias."""
        self.calls[BOTH]()
        leaves = (self._for_both[0], self._scale, self._bias)
        x, scale, bias = (leaf.grad.float().cpu().numpy() for leaf in leaves)
        return [np.moveaxis(x, 1, self._workload.channel_axis), scale, bias]

    def facts(self) -> dict[str, Any]:
        return {"layouts": self._layouts}

    def kernels(self, work: Callable[[], Any]) -> list[tuple[float, float]]:
        profiler = self._torch.profiler
        with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
            work()
        return [
            (1e-6 * event.time_range.start, 1e-6 * event.time_range.elapsed_us())
            for event in profile.events()
            if event.device_type == self._torch.autograd.DeviceType.CUDA
        ]


class Floor(OfJax):
    """What no implementation of separate passes over memory gets below: XLA's own passes over x."""

    def __init__(self, workload: Workload, dtype: str, seed: int):
        import jax
        import jax.numpy as jnp

        x, scale, bias, _ = workload.inputs(seed)
        axes = tuple(axis for axis in range(1, x.ndim) if axis != workload.channel_axis % x.ndim)
        lay_out = [1] * x.ndim
        lay_out[workload.channel_axis] = -1
        x = jax.device_put(x.astype(dtype))
        a, b = (jax.device_put(value.reshape(lay_out)) for value in (scale, bias))

        def wide(x):
            return x.astype(jnp.float32)

        functions = {
            # Not the identity, which JAX would answer without a copy.
            "copy": lambda x, a, b: -x,
            "sum": lambda x, a, b: wide(x).sum(axes),
            "sum of squares": lambda x, a, b: jnp.square(wide(x)).sum(axes),
            "multiply-add": lambda x, a, b: (wide(x) * a + b).astype(x.dtype),
        }
        assert tuple(functions) == FLOORS
        compiled = {
            name: jax.jit(function).lower(x, a, b).compile() for name, function in functions.items()
        }
        self.calls = {
            name: lambda call=call: jax.block_until_ready(call(x, a, b))
            for name, call in compiled.items()
        }


def times(
    call: Callable[[], Any], seconds: float, contender: Contender, platform: str
) -> list[float]:
    """How long calls took, in seconds.

    One more call goes first, uncounted: another process had the caches and the cores until now.

    Args:
        call: One of the contender's, after which nothing is left to be done.
        seconds: How long to go on; three calls at least. On a GPU there are always
            `PROFILED_CALLS` calls, however long they take.
        contender: Whose call it is.
        platform: On a GPU the time of a call is that of its kernels. From one kernel to the next
            it can take longer than to run them, but not where many calls are one program, as in
            training.
    """
    call()
    if platform == "gpu":
        kernels = contender.kernels(lambda: [call() for _ in range(PROFILED_CALLS)])
        return seconds_of_calls(kernels, PROFILED_CALLS)
    measured = []
    start = time.perf_counter()
    while len(measured) < 3 or time.perf_counter() - start < seconds:
        measured.append(_seconds(call))
    return measured


def seconds_of_calls(kernels: Sequence[tuple[float, float]], number: int) -> list[float]:
    """The time of each of so many equal calls, from start and duration of their kernels.

    Raises:
        RuntimeError: Calls that are equal have not the same number of kernels.
    """
    durations = [duration for _, duration in sorted(kernels)]
    each, rest = divmod(len(durations), number)
    if rest or not each:
        raise RuntimeError(f"the profiler saw {len(durations)} kernels in {number} equal calls")
    return [sum(durations[first : first + each]) for first in range(0, len(durations), each)]


def processor() -> str:
    """The processor's name where Linux tells it, or else its architecture."""
    with contextlib.suppress(OSError, StopIteration):
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith("model name")).split(": ", 1)[1]
    return platform.machine()


def cores() -> int | None:
    """How many this process may use where the system tells, or else how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def versions() -> dict[str, str]:
    """Of Python, and of every package here that is installed."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "jgn", "dm-haiku", "equinox", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    result = call()
    end = time.perf_counter()
    del result
    return end - start
