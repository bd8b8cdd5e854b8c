"""What the times mean: ratios, bandwidths, and how they are shown."""

import io
import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from jgn.bench.contenders import BOTH, FORWARD
from jgn.bench.workloads import Workload

# Arrays of x's size that separate passes over memory move: x twice and y; then x twice, the
# cotangent twice and the gradient of x.
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


def over_floor(result: dict[str, Any]) -> float | None:
    """jgn's best forward time over that of a sum, a sum of squares and a multiply-add."""
    ours = result["contenders"].get("jgn", {}).get(FORWARD)
    if not ours or not result["floor"]:
        return None
    passes = ("sum", "sum of squares", "multiply-add")
    return ours["best"] / sum(result["floor"][name]["best"] for name in passes)


def bandwidth(call: str, x_bytes: int, seconds: float) -> float:
    """Bytes a second, of those that separate passes move: what stays in a cache may beat a copy."""
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


def listing(workloads: Iterable[Workload]) -> str:
    """The workloads as text, with the size of x in float32."""
    lines = [f"{'workload':16} {'MB':>5}  {'shape of x':22} {'groups':>6}  network"]
    for workload in workloads:
        megabytes = 4 * math.prod(workload.shape) / 1e6
        shape = str(workload.shape)
        lines.append(
            f"{workload.name:16} {megabytes:5.1f}  {shape:22} {workload.num_groups:6}  "
            f"{workload.network}"
        )
    return "\n".join(lines)


def table(report: dict[str, Any]) -> str:
    """The report as text, of at most a hundred columns with four peers."""
    environment, results = report["environment"], report["results"]
    lines = [f"{name} {value}" for name, value in environment.items()]
    lines += [f"{name} is not installed" for name in report["absent"]]
    lines += [f"{name} failed: {error}" for name, error in report["failed"].items()]
    for dtype in dict.fromkeys(result["dtype"] for result in results):
        rows = [result for result in results if result["dtype"] == dtype]
        peers = [name for name in report["peers"] if any(name in r["contenders"] for r in rows)]
        lines += ["", *_times(rows, dtype), "", *_ratios(rows, dtype, peers), "", *_facts(rows)]
    return "\n".join(lines)


def _times(rows: Sequence[dict[str, Any]], dtype: str) -> list[str]:
    """Every contender's times, and its bandwidth in the best of them."""
    heading = f"{'workload':15} {'contender':14}"
    lines = [
        f"{dtype}: microseconds, best / median / interquartile range, and GB/s at best",
        f"{heading} {'forward':>27} {'GB/s':>6} {'forward and backward':>27} {'GB/s':>6}",
    ]
    for row in rows:
        copy = {"copy": {FORWARD: row["floor"]["copy"]}} if row["floor"] else {}
        for name, calls in {**copy, **row["contenders"]}.items():
            cells = [f"{row['workload']:15} {name:14}"]
            for call in (call for call in (FORWARD, BOTH) if call in calls):
                microseconds = [1e6 * calls[call][key] for key in ("best", "median", "spread")]
                moved = "copy" if name == "copy" else call
                gigabytes = bandwidth(moved, row["x_bytes"], calls[call]["best"]) / 1e9
                cells.append(" / ".join(f"{value:7.1f}" for value in microseconds))
                cells.append(f"{gigabytes:6.1f}")
            lines.append(" ".join(cells))
    return lines


def _ratios(rows: Sequence[dict[str, Any]], dtype: str, peers: Sequence[str]) -> list[str]:
    """jgn's times relative to the peers', to the floor's, and to a copy's at equal bytes."""
    widths = {peer: max(len(peer), len("0.00 / 0.00") + 2) for peer in peers}
    heading = [f"{'workload':16}", f"{'MB':>6}", *(peer.rjust(widths[peer]) for peer in peers)]
    lines = [
        f"{dtype}: jgn's best time over the peer's, forward / forward and backward; forward over",
        "the floor of three passes; bandwidth in % of a copy's",
        " ".join([*heading, f"{'× floor':>8}", f"{'of copy':>11}"]),
    ]
    for row in rows:
        cells = [f"{row['workload']:16}", f"{row['x_bytes'] / 1e6:6.1f}"]
        for peer in peers:
            pair = (_number(ratio(row, peer, call)) for call in (FORWARD, BOTH))
            cells.append(" / ".join(pair).rjust(widths[peer]))
        cells.append(f"{_number(over_floor(row)):>8}")
        shares = (share_of_copy(row, "jgn", call) for call in (FORWARD, BOTH))
        cells.append(f"{' / '.join(_percent(share) for share in shares):>11}")
        lines.append(" ".join(cells))
    cells = [f"{'geometric mean':23}"]
    for peer in peers:
        means = (geometric_mean(ratio(row, peer, call) for row in rows) for call in (FORWARD, BOTH))
        cells.append(" / ".join(map(_number, means)).rjust(widths[peer]))
    lines.append(" ".join([*cells, f"{_number(geometric_mean(map(over_floor, rows))):>8}"]))
    return lines


def _facts(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What is known of each contender beside its times; x stands for the bytes of x."""
    lines = [
        f"{'over workloads,':16} {'largest':>8} {'most kept for':>14} {'the same':>10} "
        f"{'most temporary memory':>22} {'median':>10}",
        f"{'contender':16} {'error':>8} {'the backward':>14} {'with SiLU':>10} "
        f"{'forward / and backward':>22} {'to compile':>10}",
    ]
    for name in dict.fromkeys(name for row in rows for name in row["contenders"]):
        of_name = [(row, row["contenders"][name]) for row in rows if name in row["contenders"]]
        facts = [fact for _, fact in of_name]
        cells = [f"{name:16}", f"{max(fact['error'] for fact in facts):8.1e}"]
        if "kept" in facts[0]:
            forward, both = (
                max(fact[key] / row["x_bytes"] for row, fact in of_name)
                for key in ("forward_temporary_bytes", "temporary_bytes")
            )
            cells += [
                f"{max(fact['kept'] for fact in facts):12.2f} x",
                f"{max(fact['kept_with_silu'] for fact in facts):8.2f} x",
                f"{f'{forward:.2f} x / {both:.2f} x':>22}",
                f"{statistics.median(fact['compile_seconds'] for fact in facts):8.2f} s",
            ]
        lines.append(" ".join(cells))
    return lines


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}"


def chart(report: dict[str, Any], kind: str) -> bytes:
    """A picture of the ratios, a panel a peer; where one of the two failed, a bar is missing."""
    from matplotlib.figure import Figure

    results, peers = report["results"], report["peers"]
    size = (3 + 2.4 * len(peers), 1.4 + 0.4 * len(results))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(peers), sharey=True, squeeze=False)[0]
    for panel, peer in zip(panels, peers, strict=True):
        for offset, call, grey in ((-0.2, FORWARD, "0.7"), (0.2, BOTH, "0.3")):
            ratios = [ratio(result, peer, call) for result in results]
            places = [place + offset for place, value in enumerate(ratios) if value is not None]
            widths = [value for value in ratios if value is not None]
            panel.barh(places, widths, height=0.38, color=grey, label=call)
        panel.axvline(1, color="black", linewidth=1)
        panel.set_title(peer)
        panel.set_xlabel(f"jgn's time / {peer}'s time")
    panels[0].set_yticks(range(len(results)), [f"{r['workload']}, {r['dtype']}" for r in results])
    panels[0].set_ylabel("workload")
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    picture = io.BytesIO()
    figure.savefig(picture, format=kind, dpi=120)
    return picture.getvalue()
