"""What the programs' options may be. argparse's errors show the names of these functions."""

import argparse

import numpy as np


def positive_integer(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more: got {number}")
    return number


def positive_number(text: str) -> float:
    number, limits = float(text), np.finfo(np.float32)
    if not float(limits.tiny) <= number <= float(limits.max):
        raise argparse.ArgumentTypeError(f"must be positive and finite in float32: got {number}")
    return number


def seed(text: str) -> int:
    number = int(text)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"must lie in [0, 2**32): got {number}")
    return number
