"""The 1,797 handwritten digits that scikit-learn ships, in two parts."""

from typing import NamedTuple

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
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels.astype(np.int32), test_size=TEST_SIZE, stratify=labels, random_state=0
    )
    return Digits(train_images, train_labels), Digits(test_images, test_labels)
