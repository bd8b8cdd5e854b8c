"""Trains the network: python -m jgn.examples.digits --help."""

import argparse
import contextlib
import io
import json
import math
import pathlib
import signal
import sys
import threading

import jax
import numpy as np
from flax import serialization
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib.figure import Figure
from tqdm import tqdm

from jgn.examples.digits.checkpoints import Finished, Run, RunError, checkpoints
from jgn.examples.digits.data import TEST_SIZE, Digits, load
from jgn.examples.digits.model import NORMS, Network
from jgn.examples.digits.training import (
    State,
    correct_predictions,
    create_state,
    shuffled_batches,
    steps_per_epoch,
    train_step,
)
from jgn.examples.options import positive_integer, positive_number, seed

# In every process that goes on with a run, the same programs. For a GPU each would time several
# convolutions anew, and take one of those that round in another way; on a CPU nothing changes.
_REPRODUCIBLE = {"xla_gpu_deterministic_ops": True}
_train_step = jax.jit(train_step, donate_argnums=0, compiler_options=_REPRODUCIBLE)
_correct_predictions = jax.jit(correct_predictions, compiler_options=_REPRODUCIBLE)


def main(arguments: list[str] | None = None) -> int:
    """Trains, or goes on training, and returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        return _train(options, parser)
    except (RunError, OSError) as error:  # Of the second kind is a reader of stdout that leaves.
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"stopped; the finished epochs are kept in {options.out}, "
            "and the same command goes on from there."
            if checkpoints(options.out)
            else "stopped before the first epoch was finished; the same command starts again.",
            file=sys.stderr,
        )
        return 130


def _train(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    train, test = load()
    if options.batch_size > len(train.labels):
        parser.error(
            f"--batch-size must be at most the {len(train.labels)} training images: "
            f"got {options.batch_size}."
        )
    if options.batch_size % options.devices:
        parser.error(
            f"--devices must divide --batch-size: got {options.devices} for {options.batch_size}."
        )
    replicated, split = _shardings(options.devices, parser)
    network = Network(options.norm, options.groups)
    steps = steps_per_epoch(len(train.labels), options.batch_size)
    key = jax.random.key(options.seed)
    try:
        state = create_state(network, key, options.learning_rate, steps * options.epochs)
    except ValueError as error:
        parser.error(f"--groups {options.groups}: {error}")

    settings = {name: value for name, value in vars(options).items() if name in SETTINGS}
    with _Interrupt() as interrupt, Run(options.out, settings) as run:
        finished = run.restore(state)
        state, history = jax.device_put(finished.state, replicated), finished.history
        if history:
            print(f"going on after epoch {len(history)} of {options.epochs} in {options.out}")
        for epoch in range(len(history), options.epochs):
            epoch_key = jax.random.fold_in(key, epoch)
            state, line = _epoch(state, epoch_key, train, options, split, epoch + 1, interrupt)
            if not math.isfinite(line["loss"]):
                raise RunError(
                    f"the loss is not finite in epoch {epoch + 1}; "
                    "choose a lower --learning-rate, and another --out."
                )
            line["test_accuracy"] = int(_correct_predictions(state, *test)) / TEST_SIZE
            history = [*history, line]
            run.save(Finished(state, history))
            print(
                f"epoch {epoch + 1:{len(str(options.epochs))}} of {options.epochs}: "
                f"loss {line['loss']:.4f}, training accuracy {line['accuracy']:.2%}, "
                f"test accuracy {line['test_accuracy']:.2%}",
                flush=True,
            )
        run.write("metrics.json", json.dumps({**settings, "history": history}, indent=2).encode())
        run.write("curves.png", _curves(history))
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        run.write("variables.msgpack", serialization.to_bytes(jax.device_get(variables)))
    print(f"test accuracy {history[-1]['test_accuracy']:.2%}")
    print(f"metrics.json, curves.png, variables.msgpack and the checkpoints are in {options.out}")
    return 0


class _Interrupt:
    """Ctrl-C, answered between two steps: Python swallows what is raised inside a callback."""

    def __init__(self):
        self._asked = False
        in_main_thread = threading.current_thread() is threading.main_thread()
        # No other may handle signals; and a shell's "&" has them ignored.
        self._answers = in_main_thread and signal.getsignal(signal.SIGINT) != signal.SIG_IGN

    def __enter__(self) -> "_Interrupt":
        if self._answers:
            self._former = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        if self._answers:
            signal.signal(signal.SIGINT, self._former)

    def _ask(self, *_: object) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # The second one insists.

    def raise_if_asked(self) -> None:
        if self._asked:
            raise KeyboardInterrupt


def _epoch(
    state: State,
    key: jax.Array,
    train: Digits,
    options: argparse.Namespace,
    split: NamedSharding,
    number: int,
    interrupt: "_Interrupt",
) -> tuple[State, dict[str, float]]:
    order_key, step_key = jax.random.split(key)
    batches = np.asarray(shuffled_batches(order_key, len(train.labels), options.batch_size))
    losses, correct = [], []
    progress = tqdm(batches, f"epoch {number}", leave=False, disable=not sys.stderr.isatty())
    for indices in progress:
        interrupt.raise_if_asked()
        batch = jax.device_put((train.images[indices], train.labels[indices]), split)
        state, loss, right = _train_step(state, step_key, *batch)
        losses.append(loss)
        correct.append(right)
        if not progress.disable and len(losses) % 10 == 0:
            accuracy = int(right) / options.batch_size
            progress.set_postfix(loss=f"{float(loss):.3f}", accuracy=f"{accuracy:.0%}")
    losses, correct = jax.device_get((losses, correct))
    accuracy = float(np.sum(correct)) / batches.size
    return state, {"loss": float(np.mean(losses, dtype=np.float64)), "accuracy": accuracy}


def _shardings(
    devices: int, parser: argparse.ArgumentParser
) -> tuple[NamedSharding, NamedSharding]:
    """For what every device has in full, and for what is split along its first axis."""
    if devices > 1:
        # Where there is only a CPU, it stands for several devices; elsewhere this does nothing.
        with contextlib.suppress(RuntimeError):  # JAX has started, as in a notebook.
            jax.config.update("jax_num_cpu_devices", devices)
    present = jax.local_device_count()
    if devices > present:
        parser.error(f"--devices must be at most the {present} present: got {devices}.")
    mesh = jax.make_mesh(
        (devices,), ("batch",), (AxisType.Auto,), devices=jax.local_devices()[:devices]
    )
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("batch"))


def _curves(history: list[dict[str, float]]) -> bytes:
    """A picture, as PNG, of the loss and of the errors after each epoch."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss_axes, error_axes = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    loss_axes.plot(epochs, [line["loss"] for line in history], "k-", marker=".")
    loss_axes.set(xlabel="epoch", ylabel="training loss (nats)", yscale="log")
    for name, label, style in (
        ("accuracy", "training", "k--"),
        ("test_accuracy", "test", "k-"),
    ):
        errors = [100 * (1 - line[name]) for line in history]
        error_axes.plot(epochs, errors, style, marker=".", label=label)
    error_axes.set(xlabel="epoch", ylabel="error (%)", ylim=(0, None))
    error_axes.legend()
    for axes in (loss_axes, error_axes):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    return picture.getvalue()


# The options that decide the result; a directory holds one run, with one value of each.
SETTINGS = ("norm", "groups", "batch_size", "epochs", "learning_rate", "seed")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jgn.examples.digits",
        description="Trains a small residual network on 8×8 images of handwritten digits. "
        "Checkpoints every epoch; the same command goes on where an earlier one stopped.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--norm", choices=NORMS, default="group", help="the normalization before each SiLU")
    add("--groups", type=positive_integer, default=8, help="groups of channels, for --norm group")
    add("--batch-size", type=positive_integer, default=32, help="images a step")
    add("--epochs", type=positive_integer, default=15, help="passes over the 1,437 training images")
    add("--learning-rate", type=positive_number, default=3e-3, help="AdamW's, at its highest")
    add("--seed", type=seed, default=0, help="decides parameters, order and augmentation")
    add(
        "--devices",
        type=positive_integer,
        default=1,
        help="devices that share each batch; on a machine with only a CPU they are simulated",
    )
    add(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("runs/digits"),
        help="directory of this run's checkpoints, metrics and curves",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
