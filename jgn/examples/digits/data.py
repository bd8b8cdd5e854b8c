"""The 1,797 handwritten digits that scikit-learn ships, in two parts."""

from typing import Any, NamedTuple

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_SIZE = 360


class Digits(NamedTuple):
    """Images, (number, 8, 8, 1) float32 between 0 and 1, and their labels, (number,) int32."""

    images: np.ndarray
    labels: np.ndarray


def load() -> tuple[Digits, Digits]:
    """The digits to train with and, the same in every run, a fifth of each kind to test with."""
    bunch: Any = load_digits()
    images = np.asarray(bunch.images, np.float32)[..., np.newaxis] / 16
    labels = np.asarray(bunch.target, np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_SIZE, stratify=labels, random_state=0
    )
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])
