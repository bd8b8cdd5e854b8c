"""What the times mean: ratios, bandwidths, and how they are shown."""

import io
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from jgn.bench.contenders import BOTH, FORWARD

# Arrays of x's size that a call at least moves: x twice and y; then x twice, the cotangent twice
# and the gradient of x.
TENSORS_MOVED = {"copy": 2, FORWARD: 3, BOTH: 3 + 5}


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Best, median and interquartile range of one call's times, in seconds."""
    if len(seconds) < 2:
        raise ValueError(f"a summary needs 2 times or more: got {len(seconds)}.")
    first, median, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return {"best": min(seconds), "median": median, "spread": third - first}


def ratio(result: dict[str, Any], peer: str, call: str) -> float | None:
    """jgn's best time over the peer's; None without one of them."""
    ours, theirs = (result["contenders"].get(name, {}).get(call) for name in ("jgn", peer))
    return ours["best"] / theirs["best"] if ours and theirs else None


def over_floor(result: dict[str, Any], call: str = FORWARD) -> float | None:
    """jgn's best forward time over that of a sum, a sum of squares and a multiply-add."""
    passes = ("sum", "sum of squares", "multiply-add")
    ours = result["contenders"].get("jgn", {}).get(call)
    if not ours or not result["floor"]:
        return None
    return ours["best"] / sum(result["floor"][name]["best"] for name in passes)


def bandwidth(call: str, x_bytes: int, seconds: float) -> float:
    """Bytes a second, counting only those that the call must move."""
    return TENSORS_MOVED[call] * x_bytes / seconds


def share_of_copy(result: dict[str, Any], name: str, call: str) -> float | None:
    """A contender's bandwidth relative to that of a plain copy in the same run."""
    summary_of_call = result["contenders"].get(name, {}).get(call)
    if not summary_of_call or not result["floor"]:
        return None
    copy = bandwidth("copy", result["x_bytes"], result["floor"]["copy"]["best"])
    return bandwidth(call, result["x_bytes"], summary_of_call["best"]) / copy


def geometric_mean(values: Iterable[float | None]) -> float | None:
    """Of those that are not None; None if all are."""
    logarithms = [math.log(value) for value in values if value is not None]
    return math.exp(statistics.fmean(logarithms)) if logarithms else None


def table(report: dict[str, Any]) -> str:
    """The report as text, of at most a hundred columns with three peers."""
    environment, results = report["environment"], report["results"]
    lines = [", ".join(f"{name} {value}" for name, value in environment.items())]
    lines += [f"{name} is not installed" for name in report["absent"]]
    lines += [f"{name} failed: {error}" for name, error in report["failed"].items()]
    for dtype in dict.fromkeys(result["dtype"] for result in results):
        rows = [result for result in results if result["dtype"] == dtype]
        peers = [name for name in report["peers"] if any(name in r["contenders"] for r in rows)]
        lines += ["", f"{dtype}: jgn's best time over the peer's, forward / forward and backward"]
        heading = [f"{'workload':16}", f"{'MB':>6}", *(f"{peer:>14}" for peer in peers)]
        lines.append(" ".join([*heading, f"{'× floor':>8}", f"{'of copy':>8}"]))
        for row in rows:
            ratios = [[ratio(row, peer, call) for call in (FORWARD, BOTH)] for peer in peers]
            cells = [f"{row['workload']:16}", f"{row['x_bytes'] / 1e6:6.1f}"]
            cells += [f"{_number(f)} / {_number(b)}".rjust(14) for f, b in ratios]
            cells += [_number(over_floor(row)).rjust(8)]
            share = share_of_copy(row, "jgn", FORWARD)
            cells += [("–" if share is None else f"{share:.0%}").rjust(8)]
            lines.append(" ".join(cells))
        means = [
            [geometric_mean(ratio(row, peer, call) for row in rows) for call in (FORWARD, BOTH)]
            for peer in peers
        ]
        cells = [
            f"{'geometric mean':23}",
            *(f"{_number(f)} / {_number(b)}".rjust(14) for f, b in means),
        ]
        lines.append(" ".join([*cells, _number(geometric_mean(map(over_floor, rows))).rjust(8)]))
        lines += ["", *_facts(rows)]
    return "\n".join(lines)


def _facts(rows: Sequence[dict[str, Any]]) -> list[str]:
    lines = [
        f"{'':16} {'largest':>10} {'kept for':>9} {'with':>6} {'temporary':>10} {'compiles':>9}",
        f"{'over workloads':16} {'error':>10} {'backward':>9} {'SiLU':>6} {'memory':>10} {'in':>9}",
    ]
    for name in dict.fromkeys(name for row in rows for name in row["contenders"]):
        of_name = [(row, row["contenders"][name]) for row in rows if name in row["contenders"]]
        facts = [fact for _, fact in of_name]
        cells = [f"{name:16}", f"{max(fact['error'] for fact in facts):10.1e}"]
        if "kept" in facts[0]:
            temporary = max(fact["temporary_bytes"] / row["x_bytes"] for row, fact in of_name)
            compile_seconds = statistics.median(fact["compile_seconds"] for fact in facts)
            cells += [
                f"{max(fact['kept'] for fact in facts):7.2f} x",
                f"{max(fact['kept_with_silu'] for fact in facts):4.2f} x",
                f"{temporary:8.2f} x",
                f"{compile_seconds:7.2f} s",
            ]
        lines.append(" ".join(cells))
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def chart(report: dict[str, Any], kind: str) -> bytes:
    """A picture of the ratios to flax, or to the first peer without it."""
    from matplotlib.figure import Figure

    peer = "flax" if "flax" in report["peers"] else report["peers"][0]
    results = report["results"]
    figure = Figure(figsize=(9, 1 + 0.4 * len(results)), layout="constrained")
    axes = figure.subplots()
    for offset, call, color in ((-0.2, FORWARD, "0.7"), (0.2, BOTH, "0.3")):
        widths = [ratio(result, peer, call) or 0 for result in results]
        places = [place + offset for place in range(len(results))]
        axes.barh(places, widths, height=0.38, color=color, label=call)
    axes.set_yticks(range(len(results)), [f"{r['workload']}, {r['dtype']}" for r in results])
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel(f"jgn's time / {peer}'s time (less is faster)")
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=120)
    return picture.getvalue()
