"""Records what torch's group_norm returns: python tests/record_torch.py, where torch is installed.

Every array of torch_recorded.npz is stacked over GROUP_COUNTS, except the inputs. The inputs are
eighths between −8 and 8, which every dtype holds exactly; results of half precision are stored
as float32. Scale and bias are float32 even beside an x of half precision: were they of half
precision too, torch would round the moments that it keeps for the backward pass to it.
"""

import pathlib

import numpy as np

RECORD = pathlib.Path(__file__).with_name("torch_recorded.npz")
CHANNELS = 12
GROUP_COUNTS = (1, 2, 3, 4, 6, 12)
SHAPES = {2: (3, CHANNELS), 3: (2, CHANNELS, 7), 4: (2, CHANNELS, 5, 3), 5: (2, CHANNELS, 3, 2, 2)}
DTYPES = ("float16", "bfloat16", "float32", "float64")
RESULTS = ("y", "x_gradient", "scale_gradient", "bias_gradient")


def inputs(shape, seed):
    """x, scale, bias and cotangent in float64."""
    generator = np.random.default_rng(seed)
    sizes = (shape, shape[1:2], shape[1:2], shape)
    return [np.clip(np.round(8 * generator.normal(0.5, 1, size)) / 8, -8, 8) for size in sizes]


def parameter_dtype(dtype):
    return dtype if dtype == "float64" else "float32"


def torch_results(x, scale, bias, cotangent, num_groups, dtype):
    """y and the gradients of x, scale and bias, in float64 arrays."""
    import torch

    x, scale, bias = (
        torch.tensor(value, dtype=getattr(torch, name), requires_grad=True)
        for value, name in (
            (x, dtype),
            (scale, parameter_dtype(dtype)),
            (bias, parameter_dtype(dtype)),
        )
    )
    y = torch.nn.functional.group_norm(x, num_groups, scale, bias)
    y.backward(torch.tensor(cotangent, dtype=y.dtype))
    return [value.detach().double().numpy() for value in (y, x.grad, scale.grad, bias.grad)]


def record():
    import torch

    arrays = {"torch_version": np.array(torch.__version__)}
    for rank, shape in SHAPES.items():
        given = inputs(shape, rank)
        for name, value in zip(("x", "scale", "bias", "cotangent"), given, strict=True):
            arrays[f"{name}_{rank}"] = value.astype(np.float16)
        for dtype in DTYPES:
            results = [torch_results(*given, num_groups, dtype) for num_groups in GROUP_COUNTS]
            for name, values in zip(RESULTS, zip(*results, strict=True), strict=True):
                stored = parameter_dtype(dtype)
                arrays[f"{name}_{rank}_{dtype}"] = np.stack(values).astype(stored)
    np.savez_compressed(RECORD, **arrays)


if __name__ == "__main__":
    record()
