"""A run's directory: its settings, and checkpoints of the last two finished epochs."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import serialization

from jgn._files import write_whole
from jgn.examples.digits.training import State

SETTINGS = "settings.json"


class RunError(Exception):
    """A run's directory cannot be used; the message says why, and what to do."""


class Finished(NamedTuple):
    """What was there after the last finished epoch: the state and a line of history an epoch."""

    state: State
    history: list[dict[str, float]]


def checkpoints(directory: pathlib.Path) -> list[pathlib.Path]:
    """One for each epoch that is kept; what is half written has names with letters."""
    return [path for path in (directory / "checkpoints").glob("*") if path.name.isdecimal()]


class Run:
    """A directory for one run. A context manager; opening it writes nothing over what is there."""

    def __init__(self, directory: pathlib.Path, settings: dict[str, Any]):
        self.directory = directory.absolute()
        try:
            self._claim(settings)
            (self.directory / "checkpoints").mkdir(exist_ok=True)  # orbax goes on with a file.
            for logger in ("absl", "asyncio"):  # What they tell comes as an exception, too.
                logging.getLogger(logger).setLevel(logging.CRITICAL)
            self._manager = ocp.CheckpointManager(
                self.directory / "checkpoints",
                options=ocp.CheckpointManagerOptions(
                    max_to_keep=2,
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=False,
                ),
            )
        except OSError as error:
            raise RunError(
                f"cannot write to {directory}: {error}; choose another with --out."
            ) from error
        self._refuse_stray_checkpoints()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, finished: Finished) -> None:
        """Keeps the state after an epoch; until that is done, the one before stays the newest."""
        epoch = len(finished.history)
        arrays = _arrays(finished.state)
        progress = {"history": finished.history, "digest": _digest(finished.history, arrays)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(arrays), progress=ocp.args.JsonSave(progress)
        )
        try:
            with _silencing_other_threads():
                self._manager.save(epoch, args=items)
        except Exception as error:  # A full disk comes as any of several types.
            raise RunError(
                f"cannot save epoch {epoch} in {self.directory}: {_reason(error)}; "
                "the epochs before it are kept, and the same command goes on from there."
            ) from error

    def restore(self, state: State) -> Finished:
        """The last finished epoch, or the given first state if there is none."""
        epoch = self._manager.latest_step()
        if epoch is None:
            return Finished(state, [])
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(_arrays(state)), progress=ocp.args.JsonRestore()
        )
        try:
            with _silencing_other_threads():
                restored = self._manager.restore(epoch, args=items)
            arrays, progress = restored["state"], restored["progress"]
            history = progress["history"]
            if progress["digest"] != _digest(history, arrays):
                raise ValueError("its digest is not that of its content")
            restored_state: Any = serialization.from_state_dict(state, arrays)
            return Finished(restored_state, history)
        except Exception as error:  # Whatever was damaged decides the type.
            raise RunError(self._damaged(str(epoch), _first_line(error))) from error

    def write(self, name: str, content: bytes) -> None:
        """Puts a file into the directory, whole or not at all."""
        try:
            write_whole(self.directory / name, content)
        except OSError as error:
            raise RunError(
                f"cannot write {name} in {self.directory}: {error}; "
                "the finished epochs are kept, and the same command goes on from there."
            ) from error

    def _claim(self, settings: dict[str, Any]) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        content = json.dumps(settings, indent=2)
        path = self.directory / SETTINGS
        if not path.exists():
            others = [entry.name for entry in self.directory.iterdir() if entry.name[0] != "."]
            if others:
                raise RunError(
                    f"{self.directory} is no run's directory: it has no {SETTINGS}, but "
                    f"{sorted(others)[0]}; choose another with --out."
                )
            self.write(SETTINGS, content.encode())
            return
        try:
            found = json.loads(path.read_bytes())
            different = [name for name in settings if found[name] != settings[name]]
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{path} is damaged ({_first_line(error)}); choose another directory with --out."
            ) from error
        if different:
            values = ", ".join(
                f"{name} was {found[name]} and is now {settings[name]}" for name in different
            )
            raise RunError(
                f"{self.directory} holds a run with other settings: {values}; "
                "repeat its settings to go on, or choose another directory with --out."
            )

    def _refuse_stray_checkpoints(self) -> None:
        present = {path.name for path in checkpoints(self.directory)}
        for name in sorted(present - {str(epoch) for epoch in self._manager.all_steps()}):
            self._manager.close()
            raise RunError(self._damaged(name, "its files are not a whole checkpoint"))

    def _damaged(self, name: str, reason: str) -> str:
        return (
            f"the checkpoint of epoch {int(name)} is damaged: {reason}; remove "
            f"{self.directory / 'checkpoints' / name} to go on from the one before it."
        )


def _arrays(state: State) -> Any:
    return jax.tree.map(np.asarray, serialization.to_state_dict(jax.device_get(state)))


def _digest(history: list[dict[str, float]], arrays: Any) -> str:
    digest = hashlib.sha256(json.dumps(history).encode())
    for path, array in jax.tree.leaves_with_path(arrays):
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _silencing_other_threads() -> Iterator[None]:
    """Silences uncaught errors, and once there was one for the rest of the process.

    For tensorstore's threads then find orbax's event loop closed, and tell it at great length.
    """
    hooks = sys.excepthook, sys.unraisablehook
    sys.excepthook = sys.unraisablehook = lambda *_: None
    yield
    sys.excepthook, sys.unraisablehook = hooks


def _reason(error: BaseException) -> str:
    """What the operating system says, where it does: tensorstore wraps it at great length."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    text = f": {textwrap.shorten(lines[0], 300, placeholder=' …')}" if lines else ""
    return type(error).__name__ + text
