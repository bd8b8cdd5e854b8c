"""Kills the digits example at random: python tests/kills.py. Takes a quarter of an hour.

A run of 30 epochs is ended by SIGKILL at a random moment and started again, 50 times; every third
time a random checkpoint file loses its end as well. No finished epoch may be lost to a kill, none
but the damaged one to the damage, every refusal must be one line that says what to do, and the run
must end with the bits of one that nobody disturbed.
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

EPOCHS = 30


def command(out: pathlib.Path) -> list[str]:
    return [
        *(sys.executable, "-m", "jgn.examples.digits", "--out", str(out)),
        *("--epochs", str(EPOCHS), "--batch-size", "128"),
    ]


def finished_epochs(out: pathlib.Path) -> list[int]:
    """The epochs whose checkpoints are complete: being written, they have another name."""
    return sorted(int(path.name) for path in (out / "checkpoints").glob("*") if path.name.isdigit())


def run_for(out: pathlib.Path, seconds: float) -> tuple[str, bool]:
    """Its complaints, and whether it ended before its time was up and it was killed."""
    process = subprocess.Popen(
        command(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        return process.communicate(timeout=seconds)[1], True
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        return process.communicate()[1], False


def truncate_a_file(out: pathlib.Path, generator: random.Random) -> str | None:
    """Cuts the end off a file of the newest checkpoint; its name."""
    epochs = finished_epochs(out)
    files = (
        [
            path
            for path in sorted((out / "checkpoints" / str(epochs[-1])).rglob("*"))
            if path.is_file() and path.stat().st_size
        ]
        if epochs
        else []
    )
    if not files:
        return None
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
        subprocess.run(command(undisturbed), check=True, capture_output=True)
        kills = damages = refusals = restarts = 0
        damaged = None
        while kills < options.kills:
            before = finished_epochs(disturbed)
            if kills % 3 == 2 and not damaged:
                damaged = truncate_a_file(disturbed, generator)
                damages += damaged is not None
            errors, ended = run_for(disturbed, generator.uniform(1, 12))
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
                damaged = None
                continue
            kills += not ended
            after = finished_epochs(disturbed)
            assert not before or after[-1] >= before[-1], (before, after)
            if damaged and after[-1] > before[-1]:
                damaged = None  # The file's end did not matter: the arrays have their digest.
            print(f"{kills} kills, epoch {after[-1] if after else 0} finished", flush=True)
            if ended:  # It is done: compare, and begin anew for the kills that are left.
                compare(disturbed, undisturbed)
                restarts += 1
                shutil.rmtree(disturbed)
                damaged = None
        subprocess.run(command(disturbed), check=True, capture_output=True)
        compare(disturbed, undisturbed)
    print(
        f"{kills} kills and {damages} truncated files, {refusals} of them refused, in "
        f"{restarts + 1} runs: no finished epoch lost, and the same bits at the end"
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
