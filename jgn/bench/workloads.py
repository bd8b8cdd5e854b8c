"""Inputs that group normalization gets in well-known networks; for the benchmark and the tests."""

from typing import NamedTuple

import numpy as np


class Workload(NamedTuple):
    """One layer's input: the shape of x, its groups and where its channels are."""

    name: str
    network: str
    shape: tuple[int, ...]
    num_groups: int
    channel_axis: int = -1

    @property
    def channels(self) -> int:
        return self.shape[self.channel_axis]

    def small(self) -> "Workload":
        """The same channels and groups, with few samples and positions."""
        channel = self.channel_axis % len(self.shape)
        shape = tuple(
            size if axis == channel else min(size, 2 if axis == 0 else 5)
            for axis, size in enumerate(self.shape)
        )
        return self._replace(shape=shape)

    def inputs(self, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """x, scale, bias and the cotangent of y in float32: random, and nowhere all zero."""
        generator = np.random.default_rng(seed)

        def normal(mean, shape):
            return generator.normal(mean, 1, shape).astype(np.float32)

        return (
            normal(0.5, self.shape),
            normal(1, self.channels),
            normal(0, self.channels),
            normal(0, self.shape),
        )


WORKLOADS = (
    Workload("resnet-1", "ResNet-50, stage 1", (8, 56, 56, 64), 32),
    Workload("resnet-1-wide", "ResNet-50, stage 1, block's end", (8, 56, 56, 256), 32),
    Workload("resnet-2", "ResNet-50, stage 2", (8, 28, 28, 128), 32),
    Workload("resnet-3", "ResNet-50, stage 3, block's end", (8, 14, 14, 1024), 32),
    Workload("resnet-4", "ResNet-50, stage 4, block's end", (16, 7, 7, 2048), 32),
    Workload("resnet-2-first", "ResNet-50, stage 2, channels first", (8, 128, 28, 28), 32, 1),
    Workload("unet-top", "Stable Diffusion's UNet, first level", (2, 64, 64, 320), 32),
    Workload("unet-middle", "Stable Diffusion's UNet, third level", (2, 16, 16, 1280), 32),
    Workload("unet-first", "Stable Diffusion's UNet, channels first", (2, 320, 64, 64), 32, 1),
    Workload("vae", "Stable Diffusion's VAE, decoder", (1, 256, 256, 128), 32),
    Workload("policy", "a diffusion policy's 1-D convolutions", (256, 16, 256), 8),
    Workload("segmentation", "a 3-D segmentation UNet", (1, 32, 64, 64, 32), 8),
    Workload("audio", "wav2vec 2.0's front end, a group a channel", (8, 1024, 512), 512),
    Workload("pyramid-3", "a detector's feature pyramid, level 3", (2, 100, 128, 256), 32),
    Workload("pyramid-4", "a detector's feature pyramid, level 4", (2, 50, 64, 256), 32),
    Workload("pyramid-5", "a detector's feature pyramid, level 5", (2, 25, 32, 256), 32),
    Workload("one-group", "layer normalization over channels and positions", (8, 28, 28, 512), 1),
)
