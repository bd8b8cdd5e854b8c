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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as directory:
        undisturbed, disturbed = (pathlib.Path(directory) / name for name in ("a", "b"))
        alone = subprocess.run(command(undisturbed), check=True, capture_output=True, text=True)
        lines = epochs_in(alone.stdout)
        assert list(lines) == list(range(1, EPOCHS + 1)), alone.stdout
        printed_epochs: set[int] = set()
        kills = damages = refusals = restarts = seen = 0
        damaged = None
        while kills < options.kills or damaged:
            before = finished_epochs(disturbed)
            if kills < options.kills and kills % 3 == 2 and not damaged:
                damaged = truncate_a_file(disturbed, generator)
                damages += damaged is not None
            once_it_learns = generator.random() < 0.5
            seconds = generator.uniform(0, 4 if once_it_learns else 12)
            printed, errors, ended = run_for(disturbed, seconds, once_it_learns)
            if before and printed:
                assert printed.startswith(f"going on after epoch {before[-1]} of "), printed
            assert epochs_in(printed).items() <= lines.items(), printed
            printed_epochs |= set(epochs_in(printed))
            if ended and errors:
                # A damaged newest checkpoint is refused, with the way out, and nothing changes.
                assert damaged, f"refused without damage: {errors}"
                assert re.fullmatch(r"error: .+\n", errors), errors
                newest = disturbed / "checkpoints" / str(before[-1])
                assert str(newest) in errors, errors
                assert finished_epochs(disturbed) == before
                refusals += 1
                print(f"refused after damage to {damaged}: {errors.strip()}", flush=True)
                shutil.rmtree(newest)
                printed_epochs.discard(before[-1])
                damaged = None
                continue
            kills += not ended
            after = finished_epochs(disturbed)
            assert max(after, default=0) >= max(before, default=0), (before, after)
            assert max(after, default=0) >= max(printed_epochs, default=0), (printed_epochs, after)
            seen += 0 if ended else len(epochs_in(printed))
            if damaged and after[-1] > before[-1]:
                damaged = None  # The file's end did not matter: the arrays have their digest.
            print(
                f"{kills} kills, epoch {max(printed_epochs, default=0)} printed, "
                f"{max(after, default=0)} finished",
                flush=True,
            )
            if ended:  # It is done: compare, and begin anew for the kills that are left.
                compare(disturbed, undisturbed)
                restarts += 1
                shutil.rmtree(disturbed)
                printed_epochs.clear()
                damaged = None
        subprocess.run(command(disturbed), check=True, capture_output=True)
        compare(disturbed, undisturbed)
    assert seen, "no run that was killed had printed an epoch: nothing was tried"
    print(
        f"{kills} kills and {damages} truncated files, {refusals} of them refused, in "
        f"{restarts + 1} runs: none of {seen} epochs lost that were printed as finished before "
        "a kill, and the same lines and bits as without"
    )
    return 0


def compare(out: pathlib.Path, undisturbed: pathlib.Path) -> None:
    assert (out / "metrics.json").read_bytes() == (undisturbed / "metrics.json").read_bytes()
    digests = [digest_of_newest_checkpoint(run) for run in (out, undisturbed)]
    assert digests[0] == digests[1]


def digest_of_newest_checkpoint(out: pathlib.Path) -> str:
    """SHA-256 of all its arrays, which the run keeps beside them and checks when it goes on."""
    (file,) = (out / "checkpoints" / str(EPOCHS) / "progress").glob("*metadata*")
    return json.loads(file.read_text())["digest"]


if __name__ == "__main__":
    sys.exit(main())
