"""Test error by normalization, batch size and groups: python -m jgn.examples.batch_size --help."""

import argparse
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jgn._files import is_device, write_whole
from jgn.examples.digits import (
    NORMS,
    Digits,
    Network,
    correct_predictions,
    create_state,
    load,
    shuffled_batches,
    steps_per_epoch,
    train_step,
)
from jgn.examples.options import positive_integer

BATCH_SIZES = (2, 4, 8, 16, 32)
CHANNELS = 16  # and 32 in the network's later layers
NUMBERS = (1, 2, 4, 8, 16)  # of groups, and of channels in each
BATCH_SIZE_OF_GROUPS = 4


def settings() -> list[dict]:
    """What is compared: a batch size, and options of the network."""
    over_batch_sizes = [
        {"batch_size": batch_size, "norm": norm, "groups": 4}
        for norm in NORMS
        for batch_size in BATCH_SIZES
    ]
    over_groups = [
        {"batch_size": BATCH_SIZE_OF_GROUPS, "norm": "group", **groups}
        for number in NUMBERS
        for groups in ({"groups": number}, {"groups": None, "group_size": number})
    ]
    return over_batch_sizes + [new for new in over_groups if new not in over_batch_sizes]


def test_errors(
    train: Digits, test: Digits, *, epochs: int, seeds: int, batch_size: int, **options: Any
) -> Iterator[list[float]]:
    """Trains a network for each of the seeds 0, 1, …, all of them together.

    The learning rate is 0.003 · √(batch size / 32), the usual rule for Adam; the number of epochs
    is the same for all batch sizes, as in the paper.

    Args:
        train: What to train with.
        test: What to test with.
        epochs: Passes over the training images.
        seeds: How many networks to train.
        batch_size: Images a step.
        options: Options of `Network`.

    Yields:
        After each epoch the share of the test images that each network puts in a wrong class.
    """
    network = Network(channels=CHANNELS, **options)
    examples = len(train.labels)
    total_steps = epochs * steps_per_epoch(examples, batch_size)
    learning_rate = 0.003 * (batch_size / 32) ** 0.5
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    states = jax.vmap(lambda key: create_state(network, key, learning_rate, total_steps))(keys)
    train_together = jax.jit(jax.vmap(train_step), donate_argnums=0)
    count_together = jax.jit(jax.vmap(correct_predictions, (0, None, None)))

    for epoch in range(epochs):
        epoch_keys = jax.vmap(lambda key: jax.random.fold_in(key, epoch))(keys)  # noqa: B023
        batches = jax.vmap(lambda key: shuffled_batches(key, examples, batch_size))(epoch_keys)
        for indices in np.moveaxis(np.asarray(batches), 1, 0):
            images, labels = train.images[indices], train.labels[indices]
            states, *_ = train_together(states, epoch_keys, images, labels)
        correct = np.asarray(count_together(states, *test))
        yield ((len(test.labels) - correct) / len(test.labels)).tolist()


class ForeignFileError(Exception):
    """The file holds something else than results of these options."""


def main(arguments: list[str] | None = None) -> int:
    """Trains what the file does not have yet, and returns the exit status."""
    options = _parser().parse_args(arguments)
    run = {"epochs": options.epochs, "seeds": options.seeds, "channels": CHANNELS}
    try:
        report = _read(options.out) if options.out.exists() else {**run, "results": []}
        if run != {name: report[name] for name in run}:
            raise ForeignFileError("it has results of other options; choose another --out.")
        _write(report, options.out)  # Before any work, which would be lost.
        return _train(report, options)
    except (OSError, ForeignFileError) as error:
        print(f"error: {options.out}: {error}", file=sys.stderr)
        return 1


def _train(report: dict[str, Any], options: argparse.Namespace) -> int:
    train, test = load()
    finished = [result["setting"] for result in report["results"]]
    left = [setting for setting in settings() if setting not in finished]
    run = {"epochs": options.epochs, "seeds": options.seeds}
    try:
        for setting in tqdm(left, "settings", disable=not sys.stderr.isatty()):
            *_, errors = test_errors(train, test, **run, **setting)
            report["results"].append({"setting": setting, "test_errors": errors})
            _write(report, options.out)
    except KeyboardInterrupt:
        print(
            f"stopped; {len(report['results'])} finished settings are kept in {options.out}, "
            "and the same command goes on from there.",
            file=sys.stderr,
        )
        return 130
    print(f"the test errors of {len(report['results'])} settings are in {options.out}")
    return 0


def _read(file: pathlib.Path) -> dict[str, Any]:
    try:
        if is_device(file):
            raise ValueError
        report = json.loads(file.read_text())
        results = [
            {name: r[name] for name in ("setting", "test_errors")} for r in report["results"]
        ]
        return {
            **{name: report[name] for name in ("epochs", "seeds", "channels")},
            "results": results,
        }
    except (ValueError, KeyError, TypeError):
        raise ForeignFileError("it is no file of results; choose another --out.") from None


def _write(report: dict[str, Any], file: pathlib.Path) -> None:
    write_whole(file, json.dumps(report, indent=1).encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jgn.examples.batch_size",
        description="Trains the digits network with every normalization at several batch sizes, "
        "and with several numbers and sizes of groups, from several seeds each. Writes its file "
        "after each; the same command goes on where an earlier one stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=positive_integer, default=10, help="passes over the training images")
    add("--seeds", type=positive_integer, default=8, help="networks trained for each setting")
    add("--out", type=pathlib.Path, default=pathlib.Path("batch_size.json"), help="file of results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
