"""The benchmark's command: python -m jgn.bench --help."""

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jgn.bench import report as reporting
from jgn.bench.contenders import FLOORS, PEERS, is_installed, versions
from jgn.bench.workloads import WORKLOADS, Workload

# Freed arrays stay with the process: fresh ones cost a page fault every 4 KiB, whoever asks.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
# How long one contender has a turn, in seconds.
TURN = 0.05


class WorkerError(Exception):
    """A contender's process cannot do what it was asked."""


class Worker:
    """The process of one contender. All processes live on, but only one at a time works."""

    def __init__(self, contender: str):
        self.contender = contender
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jgn.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **ALLOCATOR, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        )

    def ask(self, **request: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise WorkerError(f"its process ended with status {self._process.wait()}")
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply["answer"]

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


def compare(
    workloads: Sequence[Workload], dtypes: Sequence[str], peers: Sequence[str], rounds: int
) -> dict[str, Any]:
    """Times jgn and its peers, in alternation, and returns what `--json` writes."""
    from tqdm import tqdm

    failed: dict[str, str] = {}
    results = []
    with contextlib.ExitStack() as stack:
        workers = [Worker(name) for name in ("floor", "jgn", *peers)]
        for worker in workers:
            stack.callback(worker.close)
        device = workers[0].ask(device="")
        pairs = [(workload, dtype) for dtype in dtypes for workload in workloads]
        with tqdm(total=len(pairs) * (rounds + 1), disable=not sys.stderr.isatty()) as progress:
            for workload, dtype in pairs:
                progress.set_description(f"{workload.name}, {dtype}")
                for _ in _measure(workload, dtype, workers, rounds, failed, results):
                    progress.update()
    environment = {"device": device, "cores": os.cpu_count(), **versions(), **ALLOCATOR}
    return {
        "environment": environment,
        "rounds": rounds,
        "peers": list(peers),
        "absent": [name for name in PEERS if not is_installed(name) and "-" not in name],
        "failed": failed,
        "results": results,
    }


def _measure(
    workload: Workload,
    dtype: str,
    workers: Sequence[Worker],
    rounds: int,
    failed: dict[str, str],
    results: list[dict[str, Any]],
) -> Iterator[None]:
    """Appends one workload's result, and yields after its preparation and after every round."""
    facts, times = {}, {}
    for seed, worker in enumerate(workers):
        with _noted(failed, f"{worker.contender}, {workload.name}, {dtype}"):
            facts[worker.contender] = worker.ask(
                prepare=workload, contender=worker.contender, dtype=dtype, seed=seed
            )
    yield
    for _ in range(rounds):
        for worker in workers:
            calls = FLOORS if worker.contender == "floor" else (reporting.FORWARD, reporting.BOTH)
            for call in calls if worker.contender in facts else ():
                with _noted(failed, f"{worker.contender}, {workload.name}, {dtype}"):
                    measured = worker.ask(time=call, seconds=TURN)
                    times.setdefault(worker.contender, {}).setdefault(call, []).extend(measured)
        yield
    summaries = {
        name: {call: reporting.summary(seconds) for call, seconds in calls.items()}
        for name, calls in times.items()
    }
    item_bytes = 4 if dtype == "float32" else 2
    x_bytes = item_bytes
    for size in workload.shape:
        x_bytes *= size
    results.append(
        {
            "workload": workload.name,
            "network": workload.network,
            "shape": workload.shape,
            "num_groups": workload.num_groups,
            "channel_axis": workload.channel_axis,
            "dtype": dtype,
            "x_bytes": x_bytes,
            "floor": summaries.pop("floor", {}),
            "contenders": {name: {**facts[name], **calls} for name, calls in summaries.items()},
        }
    )


@contextlib.contextmanager
def _noted(failed: dict[str, str], what: str) -> Iterator[None]:
    try:
        yield
    except WorkerError as error:
        failed[what] = str(error)


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(workload.name for workload in WORKLOADS)
    parser = argparse.ArgumentParser(
        prog="python -m jgn.bench",
        description="Compares jgn with the other implementations of group normalization that are "
        "installed, on this machine's device. Times are of compiled calls, best of many.",
    )
    add = parser.add_argument
    add("--workloads", nargs="+", metavar="NAME", help=f"all, unless named: {names}")
    add("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    add("--peers", nargs="+", choices=PEERS, help="all that are installed, unless named")
    add("--rounds", type=int, default=10, help="turns of each contender (10)")
    add("--json", type=pathlib.Path, metavar="FILE", help="writes everything measured")
    add("--plot", type=pathlib.Path, metavar="FILE", help="draws the ratios, as .png, .svg or .pdf")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, and returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    by_name = {workload.name: workload for workload in WORKLOADS}
    for name in options.workloads or ():
        if name not in by_name:
            parser.error(f"no workload is named {name!r}; there are {', '.join(by_name)}.")
    for name in options.peers or ():
        if not is_installed(name):
            parser.error(f"{name} is not installed.")
    if options.rounds < 1:
        parser.error(f"--rounds must be 1 or more: got {options.rounds}.")
    for file in filter(None, (options.json, options.plot)):
        if not file.absolute().parent.is_dir():
            parser.error(f"there is no directory {file.absolute().parent} for {file.name}.")
    kind = options.plot.suffix[1:] if options.plot else ""
    if options.plot and kind not in ("png", "svg", "pdf"):
        parser.error(f"--plot must end in .png, .svg or .pdf: got {options.plot.name}.")

    # Compiling torch's function pays on a GPU only; on a CPU it needs a C++ compiler.
    peers = options.peers or [name for name in PEERS if is_installed(name) and "-" not in name]
    workloads = [by_name[name] for name in options.workloads or by_name]
    report = compare(workloads, options.dtype, peers, options.rounds)
    print(reporting.table(report))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        options.plot.write_bytes(reporting.chart(report, kind))
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
