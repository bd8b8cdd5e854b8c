"""The benchmark: its arithmetic, its contenders' agreement, and its command."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from oracle import tolerance

from jgn.bench import contenders, report
from jgn.bench.__main__ import main
from jgn.bench.workloads import WORKLOADS

EVERY_CONTENDER = pytest.mark.parametrize("name", ["jgn", "flax", "haiku", "equinox"])
# torch in a process of its own, below: beside XLA their threads wait for each other.


def test_a_summary_is_best_median_and_interquartile_range():
    found = report.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"best": 1.0, "median": 3.0, "spread": 2.0}
    with pytest.raises(ValueError, match="got 1"):
        report.summary([1.0])


def result(**best):
    """One workload of a million bytes; contenders' best forward times, floors' and copy's."""
    return {
        "workload": "w",
        "dtype": "float32",
        "x_bytes": 1_000_000,
        "floor": {
            name: {"best": best.get(name, 1.0)}
            for name in ("copy", "sum", "sum of squares", "multiply-add")
        },
        "contenders": {
            name: {"forward": {"best": best[name]}, "error": 0.0}
            for name in ("jgn", "flax", "torch")
            if name in best
        },
    }


def test_ratios_are_of_best_times_and_absent_where_a_contender_is():
    found = result(jgn=2.0, flax=8.0)
    assert report.ratio(found, "flax", "forward") == 0.25
    assert report.ratio(found, "torch", "forward") is None
    assert report.ratio(found, "flax", "forward and backward") is None


def test_the_floor_is_the_sum_of_three_passes():
    found = result(**{"jgn": 9.0, "sum": 1.0, "sum of squares": 2.0, "multiply-add": 3.0})
    assert report.over_floor(found) == 1.5
    assert report.over_floor({**found, "floor": {}}) is None


def test_bandwidth_counts_the_tensors_that_must_move():
    assert report.bandwidth("copy", 100, 2.0) == 100
    assert report.bandwidth("forward", 100, 2.0) == 150
    assert report.bandwidth("forward and backward", 100, 2.0) == 400
    # 3 tensors in 3 s, where a copy moves 2 in 1 s.
    assert report.share_of_copy(result(jgn=3.0), "jgn", "forward") == 0.5


def test_the_geometric_mean_leaves_out_what_is_missing():
    assert report.geometric_mean([1.0, None, 4.0]) == pytest.approx(2.0)
    assert report.geometric_mean([None]) is None


def test_bytes_kept_are_those_of_the_residuals():
    x = jax.ShapeDtypeStruct((10, 10), "float32")
    assert contenders.bytes_kept(jax.numpy.sin, x) == 400  # cos(x)
    assert contenders.bytes_kept(lambda x: x + x, x) == 0
    assert contenders.bytes_kept(lambda a, b: a * b, x, x) == 800


def test_names_of_workloads_differ_and_their_groups_divide_their_channels():
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS)
    for workload in WORKLOADS:
        assert workload.channels % workload.num_groups == 0
        assert 4 * np.prod(workload.shape) < 40e6


def available(name):
    if not contenders.is_installed(name):
        pytest.skip(f"{name} is not installed")


@EVERY_CONTENDER
@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)
def test_every_contender_computes_the_same(name, workload):
    available(name)
    small = workload.small()
    x, scale, bias, _ = small.inputs(0)
    with jax.numpy_dtype_promotion("standard"):
        contender = contenders.make(name, small, "float32", 0)
        ours = contenders.make("jgn", small, "float32", 0)
    wanted = contenders.reference(x, scale, bias, small)
    # Theirs may cost a few roundings more; a wrong group or axis costs all digits.
    atol = 4 * tolerance("float32", x.size) * np.abs(wanted).max()
    np.testing.assert_allclose(contender.output(), wanted, rtol=0, atol=atol)
    for theirs, expected in zip(contender.gradients(), ours.gradients(), strict=True):
        atol = 4 * tolerance("float32", x.size) * np.abs(expected).max()
        np.testing.assert_allclose(theirs, expected, rtol=0, atol=atol)


def run(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-m", "jgn.bench", *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env=environment,
        check=False,
    )


def test_the_command_measures_writes_and_draws(tmp_path):
    peers = ["flax", *(["torch"] if contenders.is_installed("torch") else [])]
    found = run(
        *("--workloads", "pyramid-5", "--dtype", "float32", "bfloat16", "--rounds", "2"),
        *("--peers", *peers, "--json", tmp_path / "b.json", "--plot", tmp_path / "b.png"),
    )
    assert found.returncode == 0, found.stdout + found.stderr
    assert "bfloat16: jgn's best time over the peer's" in found.stdout
    measured = json.loads((tmp_path / "b.json").read_text())
    assert [row["dtype"] for row in measured["results"]] == ["float32", "bfloat16"]
    assert measured["failed"] == {}
    for row, largest_error in zip(measured["results"], (1e-6, 2**-7), strict=True):
        assert row["x_bytes"] == 2 * 25 * 32 * 256 * (4 if row["dtype"] == "float32" else 2)
        assert row["contenders"].keys() == {"jgn", *peers}
        assert row["floor"].keys() == set(contenders.FLOORS)
        for contender in row["contenders"].values():
            assert contender["error"] < largest_error
            for call in ("forward", "forward and backward"):
                assert 0 < contender[call]["best"] <= contender[call]["median"]
        assert row["contenders"]["jgn"]["kept_with_silu"] < 1.02
        assert row["contenders"]["flax"]["kept_with_silu"] > 3
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_is_absent_or_fails_is_named():
    shown = report.table(
        {
            "environment": {"device": "cpu"},
            "peers": ["flax"],
            "absent": ["torch"],
            "failed": {"flax, vae, float32": "out of memory"},
            "results": [result(jgn=1.0)],
        }
    )
    assert "torch is not installed" in shown
    assert "flax, vae, float32 failed: out of memory" in shown


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--workloads", "nonesuch"], "no workload is named 'nonesuch'; there are resnet-1, "),
        (["--rounds", "0"], "--rounds must be 1 or more: got 0."),
        (["--peers", "tensorflow"], "invalid choice: 'tensorflow'"),
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--json", "absent/b.json"], "there is no directory "),
        (["--plot", "b.doc"], "--plot must end in .png, .svg or .pdf: got b.doc."),
    ],
    ids=str,
)
def test_bad_options_are_told_before_any_work(capsys, arguments, text):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert text in capsys.readouterr().err
