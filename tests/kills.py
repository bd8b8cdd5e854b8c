"""Kills the digits example at random: python tests/kills.py. Takes a quarter of an hour.

A run of 30 epochs is ended by SIGKILL at a random moment and started again, 50 times; every third
time a random checkpoint file loses its end as well. No epoch that was printed as finished may be
lost to a kill, none but the damaged one to the damage, every refusal must be one line that says
what to do, and the run must print what one that nobody disturbed prints, and end with its bits.
"""

import argparse
import json
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import TextIO

EPOCHS = 30


def command(out: pathlib.Path) -> list[str]:
    return [
        *(sys.executable, "-m", "jgn.examples.digits", "--out", str(out)),
        *("--epochs", str(EPOCHS), "--batch-size", "128"),
    ]


def finished_epochs(out: pathlib.Path) -> list[int]:
    """The epochs whose checkpoints are complete: being written, they have another name."""
    return sorted(int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit())


def epochs_in(printed: str) -> dict[int, str]:
    """The line of every epoch that was printed as finished."""
    lines = re.finditer(r"^epoch +(\d+) of .+\n", printed, re.MULTILINE)
    return {int(line[1]): line[0] for line in lines}


def run_for(out: pathlib.Path, seconds: float, once_it_learns: bool) -> tuple[str, str, bool]:
    """What it printed, its complaints, and whether it ended before it was killed.

    Args:
        out: Its directory.
        seconds: When it is killed, from its start or from the first epoch that it prints.
        once_it_learns: Which of the two.
    """
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command(out), stdout=printed, stderr=errors)
        while once_it_learns and process.poll() is None and not epochs_in(content(printed)):
            time.sleep(0.01)
        try:
            process.wait(seconds)
            ended = True
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            ended = False
        return content(printed), content(errors), ended


def content(file: TextIO) -> str:
    # The other process writes at the place that the two share: only pread leaves it where it is.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode()


def truncate_a_file(out: pathlib.Path, generator: random.Random) -> str | None:
    """Cuts the end off a file of the newest checkpoint; its name.

    Only where there is an older one to go on from: the run keeps two.
    """
    epochs = finished_epochs(out)
    if len(epochs) < 2:
        return None
    files = [
        path
        for path in sorted((out / "checkpoints" / str(epochs[-1])).rglob("*"))
        if path.is_file() and path.stat().st_size
    ]
    file = generator.choice(files)
    os.truncate(file, generator.randrange(file.stat().st_size))
    return str(file.relative_to(out))


class Trial:
    """A run that is killed, damaged and started again, beside one that nobody disturbs."""

    def __init__(self, directory: pathlib.Path):
        self.undisturbed, self.out = directory / "undisturbed", directory / "disturbed"
        alone = subprocess.run(
            command(self.undisturbed), check=True, capture_output=True, text=True
        )
        self.lines = epochs_in(alone.stdout)
        assert list(self.lines) == list(range(1, EPOCHS + 1)), alone.stdout
        self.printed_epochs: set[int] = set()
        self.damaged: str | None = None
        self.kills = self.damages = self.refusals = self.ends = self.seen = 0

    def damage(self, generator: random.Random) -> None:
        self.damaged = truncate_a_file(self.out, generator)
        self.damages += self.damaged is not None

    def start_and_kill(self, seconds: float, once_it_learns: bool) -> None:
        before = finished_epochs(self.out)
        printed, errors, ended = run_for(self.out, seconds, once_it_learns)
        if before and printed:
            assert printed.startswith(f"going on after epoch {before[-1]} of "), printed
        assert epochs_in(printed).items() <= self.lines.items(), printed
        self.printed_epochs |= set(epochs_in(printed))
        if ended and errors:
            self._accept_refusal(before, errors)
            return
        self.kills += not ended
        self.seen += 0 if ended else len(epochs_in(printed))
        self._find_every_epoch(before)
        if ended:
            self.compare()
            self.ends += 1
            shutil.rmtree(self.out)
            self.printed_epochs.clear()
            self.damaged = None

    def _accept_refusal(self, before: list[int], errors: str) -> None:
        """A damaged newest checkpoint is refused, with the way out, and nothing changes."""
        assert self.damaged, f"refused without damage: {errors}"
        assert re.fullmatch(r"error: .+\n", errors), errors
        newest = self.out / "checkpoints" / str(before[-1])
        assert str(newest) in errors, errors
        assert finished_epochs(self.out) == before
        print(f"refused after damage to {self.damaged}: {errors.strip()}", flush=True)
        self.refusals += 1
        self.damaged = None
        shutil.rmtree(newest)
        self.printed_epochs.discard(before[-1])

    def _find_every_epoch(self, before: list[int]) -> None:
        """None is lost that was there, or was printed as finished."""
        after = finished_epochs(self.out)
        newest, newest_printed = max(after, default=0), max(self.printed_epochs, default=0)
        assert newest >= max(before, default=0), (before, after)
        assert newest >= newest_printed, (self.printed_epochs, after)
        if self.damaged and newest > before[-1]:
            self.damaged = None  # The file's end did not matter: the arrays have their digest.
        print(f"{self.kills} kills, epoch {newest_printed} printed, {newest} finished", flush=True)

    def finish(self) -> None:
        subprocess.run(command(self.out), check=True, capture_output=True)
        self.compare()
        assert self.seen, "no run that was killed had printed an epoch: nothing was tried"

    def compare(self) -> None:
        """It has ended as the other one did."""
        runs = self.out, self.undisturbed
        metrics = [(run / "metrics.json").read_bytes() for run in runs]
        assert metrics[0] == metrics[1]
        digests = [digest_of_newest_checkpoint(run) for run in runs]
        assert digests[0] == digests[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as directory:
        trial = Trial(pathlib.Path(directory))
        while trial.kills < options.kills or trial.damaged:
            if trial.kills < options.kills and trial.kills % 3 == 2 and not trial.damaged:
                trial.damage(generator)
            once_it_learns = generator.random() < 0.5
            trial.start_and_kill(generator.uniform(0, 4 if once_it_learns else 12), once_it_learns)
        trial.finish()
    print(
        f"{trial.kills} kills and {trial.damages} truncated files, {trial.refusals} of them "
        f"refused, in {trial.ends + 1} runs: none of {trial.seen} epochs lost that were printed as "
        "finished before a kill, and the same lines and bits as without"
    )
    return 0


def digest_of_newest_checkpoint(out: pathlib.Path) -> str:
    """SHA-256 of all its arrays, which the run keeps beside them and checks when it goes on."""
    (file,) = (out / "checkpoints" / str(EPOCHS) / "progress").glob("*metadata*")
    return json.loads(file.read_text())["digest"]


if __name__ == "__main__":
    sys.exit(main())
