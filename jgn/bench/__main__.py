"""The benchmark's command: python -m jgn.bench --help."""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jgn._files import behind_links, is_device, write_whole
from jgn.bench import report as reporting
from jgn.bench.contenders import (
    COMPILED,
    FLOORS,
    PACKAGES,
    PEERS,
    cores,
    is_installed,
    processor,
    versions,
)
from jgn.bench.workloads import WORKLOADS, Workload

SETTINGS = {
    # Freed arrays stay with the process: fresh ones cost a page fault every 4 KiB, whoever asks.
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
    "MALLOC_ARENA_MAX": "1",
    # One GPU's memory is for all the processes.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    # Else the second run's compile times would be those of reading a file.
    "JAX_ENABLE_COMPILATION_CACHE": "false",
}
# On a busy CPU, torch's threads else share one core, and wait for each other by spinning: calls of
# 0.1 ms were seen to take 4 to 20 ms, for whole runs.
TORCH_SETTINGS = {"OMP_PROC_BIND": "true"}
# How long one contender has a turn, in seconds.
TURN = 0.05
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


class WorkerError(Exception):
    """A contender's process cannot do what it was asked."""


class Worker:
    """The process of one contender. All processes live on, but only one at a time works."""

    def __init__(self, contender: str, settings: dict[str, str]):
        self.contender = contender
        self._settings = settings
        self._start()

    def _start(self) -> None:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jgn.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **self._settings},
        )

    def prepare(self, workload: Workload, **options: Any) -> Any:
        """Gives the process a workload; another process, if the last one ended."""
        if self._process.poll() is not None:
            self.close()
            self._start()
        return self.ask(prepare=workload, contender=self.contender, **options)

    def ask(self, **request: Any) -> Any:
        """The answer to one request, as `jgn.bench.worker.answer` gives it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(self._last_words())
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["answer"]

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = [line for line in self._errors.read().splitlines() if line.strip()]
        return ": ".join([f"its process ended with status {status}", *lines[-1:]])

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


def compare(
    workloads: Sequence[Workload],
    dtypes: Sequence[str],
    peers: Sequence[str] | None,
    rounds: int,
) -> dict[str, Any]:
    """Times jgn and its peers, in alternation, and returns what `--json` writes.

    Args:
        workloads: What to time.
        dtypes: Of x, each for all workloads.
        peers: Contenders beside jgn. None: all that are installed; compiled torch on a GPU only,
            as on a CPU it needs a C++ compiler and gains nothing.
        rounds: How many turns of `TURN` seconds each call of each contender has.

    Raises:
        WorkerError: JAX finds no device. A contender that fails is noted in the report instead.
    """
    from tqdm import tqdm

    failed: dict[str, str] = {}
    results = []
    with contextlib.ExitStack() as stack:

        def worker(name: str) -> Worker:
            is_bound = PACKAGES.get(name) == "torch" and environment["platform"] == "cpu"
            started = Worker(name, {**SETTINGS, **(TORCH_SETTINGS if is_bound else {})})
            stack.callback(started.close)
            return started

        floor = worker("floor")
        environment = floor.ask(device="")
        if peers is None:
            excluded = (COMPILED,) if environment["platform"] == "cpu" else ()
            peers = [name for name in PEERS if is_installed(name) and name not in excluded]
        workers = [floor, *(worker(name) for name in ("jgn", *peers))]
        pairs = [(workload, dtype) for dtype in dtypes for workload in workloads]
        with tqdm(total=len(pairs) * (rounds + 1), disable=not sys.stderr.isatty()) as progress:
            for workload, dtype in pairs:
                progress.set_description(f"{workload.name}, {dtype}")
                options = {"dtype": dtype, "platform": environment["platform"]}
                measured = _measure(workload, options, workers, rounds, failed, progress.update)
                results.append(measured)
    return {
        "environment": {
            **environment,
            "times": "of kernels" if environment["platform"] == "gpu" else "of calls",
            "processor": processor(),
            "cores": cores(),
            **versions(),
            **SETTINGS,
            **{f"{name} (torch on a CPU)": value for name, value in TORCH_SETTINGS.items()},
        },
        "rounds": rounds,
        "turn_seconds": TURN,
        "peers": list(peers),
        "absent": [name for name in PEERS if PACKAGES[name] == name and not is_installed(name)],
        "failed": failed,
        "results": results,
    }


def _measure(
    workload: Workload,
    options: dict[str, str],
    workers: Sequence[Worker],
    rounds: int,
    failed: dict[str, str],
    tick: Callable[[], object],
) -> dict[str, Any]:
    """One workload's result; ticks after its preparation and after every round.

    Whoever fails leaves no time behind, and sits out until the next workload.
    """
    dtype = options["dtype"]
    facts: dict[str, dict[str, Any]] = {}
    times: dict[str, dict[str, list[float]]] = {}

    @contextlib.contextmanager
    def noted(contender: str) -> Iterator[None]:
        try:
            yield
        except WorkerError as error:
            failed[f"{contender}, {workload.name}, {dtype}"] = str(error)
            facts.pop(contender, None)

    for seed, worker in enumerate(workers):
        with noted(worker.contender):
            facts[worker.contender] = worker.prepare(workload, seed=seed, **options)
            calls = FLOORS if worker.contender == "floor" else (reporting.FORWARD, reporting.BOTH)
            times[worker.contender] = {call: [] for call in calls}
    tick()
    for _ in range(rounds):
        for worker in workers:
            if worker.contender in facts:
                with noted(worker.contender):
                    for call, measured in times[worker.contender].items():
                        measured += worker.ask(time=call, seconds=TURN)
        tick()
    summaries = {
        name: {call: reporting.summary(measured) for call, measured in times[name].items()}
        for name in facts
    }
    return {
        "workload": workload.name,
        "network": workload.network,
        "shape": workload.shape,
        "num_groups": workload.num_groups,
        "channel_axis": workload.channel_axis,
        "dtype": dtype,
        "x_bytes": ITEM_BYTES[dtype] * math.prod(workload.shape),
        "floor": summaries.pop("floor", {}),
        "contenders": {name: {**facts[name], **calls} for name, calls in summaries.items()},
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jgn.bench",
        description="Compares jgn with the other implementations of group normalization that are "
        "installed, on this machine's device. Ratios are of the best times of compiled calls.",
    )
    add = parser.add_argument
    add("--list", action="store_true", help="lists the workloads, and measures nothing")
    add("--workloads", nargs="+", metavar="NAME", help="all, unless named; see --list")
    add("--dtype", nargs="+", choices=tuple(ITEM_BYTES), default=["float32"], help="(float32)")
    add(
        "--peers",
        nargs="+",
        choices=PEERS,
        help="all that are installed, torch-compiled on a GPU only, unless named",
    )
    add("--rounds", type=int, default=10, help="turns of each contender (10)")
    add("--json", type=pathlib.Path, metavar="FILE", help="writes everything measured")
    add("--plot", type=pathlib.Path, metavar="FILE", help="draws the ratios, as .png, .svg or .pdf")
    return parser


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends the program, with the reason, if an option cannot be followed."""
    names = [workload.name for workload in WORKLOADS]
    for name in options.workloads or ():
        if name not in names:
            parser.error(f"no workload is named {name!r}; there are {', '.join(names)}.")
    for name in options.peers or ():
        if not is_installed(name):
            parser.error(f"{name} is not installed: the package {PACKAGES[name]!r} is missing.")
    if options.rounds < 1:
        parser.error(f"--rounds must be 1 or more: got {options.rounds}.")
    files = [file for file in (options.json, options.plot) if file]
    for file in files:
        directory = behind_links(file).parent
        if not directory.is_dir():
            parser.error(f"there is no directory {directory} for {file.name}.")
        if file.is_dir() or not os.access(file if is_device(file) else directory, os.W_OK):
            parser.error(f"{file} cannot be written.")
    if len(set(map(behind_links, files))) < len(files):
        parser.error(f"--json and --plot must be two files: got {options.json} and {options.plot}.")
    if options.plot and _kind(options.plot) not in ("png", "svg", "pdf"):
        parser.error(f"--plot must end in .png, .svg or .pdf: got {options.plot.name}.")
    for package in ("tqdm", "matplotlib") if options.plot else ("tqdm",):
        if importlib.util.find_spec(package) is None:
            parser.error(f"{package} is not installed; pip install 'jgn[bench]' brings it.")


def _kind(picture: pathlib.Path) -> str:
    return picture.suffix[1:].lower()


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the tables, and returns the exit status: 1 if anything failed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.list:
        print(reporting.listing(WORKLOADS))
        return 0
    _check(parser, options)
    chosen = options.workloads or [workload.name for workload in WORKLOADS]
    try:
        report = compare(
            [workload for workload in WORKLOADS if workload.name in chosen],
            list(dict.fromkeys(options.dtype)),
            options.peers and list(dict.fromkeys(options.peers)),
            options.rounds,
        )
    except WorkerError as error:
        parser.exit(1, f"JAX finds no device: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nStopped; nothing is written.\n")
    status = 1 if report["failed"] else 0
    for file, content in (
        (options.json, lambda: (json.dumps(report, indent=1) + "\n").encode()),
        (options.plot, lambda: reporting.chart(report, _kind(options.plot))),
    ):
        if file:
            try:
                write_whole(file, content())
            except OSError as error:
                print(f"cannot write {file}: {error}", file=sys.stderr)
                status = 1
    print(reporting.table(report))  # At last, as whoever reads it may be gone.
    return status


if __name__ == "__main__":
    sys.exit(main())
