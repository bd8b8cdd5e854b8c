"""A small residual network learns handwritten digits: python -m jgn.examples.digits --help."""

from jgn.examples.digits.data import Digits, load
from jgn.examples.digits.model import NORMS, Network
from jgn.examples.digits.training import (
    State,
    correct_predictions,
    create_state,
    shuffled_batches,
    steps_per_epoch,
    train_step,
)

__all__ = [
    "NORMS",
    "Digits",
    "Network",
    "State",
    "correct_predictions",
    "create_state",
    "load",
    "shuffled_batches",
    "steps_per_epoch",
    "train_step",
]
