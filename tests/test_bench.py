"""The benchmark: its arithmetic, its contenders' agreement, and its command."""

import functools
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from oracle import Oracle, tolerance

from jgn.bench import contenders, report
from jgn.bench.__main__ import Worker, WorkerError, _measure, _write, main
from jgn.bench.workloads import WORKLOADS

EVERY_CONTENDER = pytest.mark.parametrize("name", ["jgn", "flax", "haiku", "equinox"])
EVERY_WORKLOAD = pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)


def test_a_summary_is_best_median_and_interquartile_range():
    found = report.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"best": 1.0, "median": 3.0, "spread": 2.0}
    with pytest.raises(ValueError, match="got 1"):
        report.summary([1.0])


def result(**best):
    """One workload of a million bytes; contenders' best forward times, floors' and copy's."""

    def times(name):
        return {"best": best.get(name, 1.0), "median": 2.0, "spread": 0.5}

    return {
        "workload": "w",
        "dtype": "float32",
        "x_bytes": 1_000_000,
        "floor": {name: times(name) for name in contenders.FLOORS},
        "contenders": {
            name: {"forward": times(name), "error": 0.0}
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


@functools.cache
def wanted(workload):
    """y and the gradients of x, scale and bias, each with what its rounding grows with."""
    x, scale, bias, cotangent = workload.inputs(0)
    oracle = Oracle(
        x,
        workload.num_groups,
        scale,
        bias,
        epsilon=contenders.EPSILON,
        channel_axis=workload.channel_axis,
    )
    gradients = oracle.gradients(cotangent)
    sizes = (oracle.gradient_terms(cotangent), *(np.abs(g).max() for g in gradients[1:]))
    return [(oracle.y, np.abs(oracle.y).max()), *zip(gradients, sizes, strict=True)]


def assert_agrees(workload, results):
    for given, (expected, size) in zip(results, wanted(workload), strict=True):
        # Theirs may cost a few roundings more; a wrong group or axis costs all digits.
        atol = 4 * tolerance("float32", expected.size) * size
        np.testing.assert_allclose(given, expected, rtol=0, atol=atol)


@EVERY_WORKLOAD
@EVERY_CONTENDER
def test_every_contender_computes_the_same(name, workload):
    if not contenders.is_installed(name):
        pytest.skip(f"{name} is not installed")
    workload = workload.small()
    with jax.numpy_dtype_promotion("standard"):  # Theirs relies on it.
        contender = contenders.make(name, workload, "float32", 0, jax.default_backend())
        assert_agrees(workload, [contender.output(), *contender.gradients()])


@pytest.fixture(scope="module")
def torchs_results(tmp_path_factory):
    """In a process of torch's own: beside XLA's threads, its threads wait for each other."""
    if not contenders.is_installed("torch"):
        pytest.skip("torch is not installed")
    file = tmp_path_factory.mktemp("torch") / "results.npz"
    program = f"""if True:
        import numpy as np
        from jgn.bench import contenders, workloads

        results = {{}}
        for workload in workloads.WORKLOADS:
            torch = contenders.make("torch", workload.small(), "float32", 0, "cpu")
            for index, values in enumerate([torch.output(), *torch.gradients()]):
                results[f"{{workload.name}} {{index}}"] = values
        np.savez({str(file)!r}, **results)
    """
    subprocess.run([sys.executable, "-c", program], timeout=240, check=True)
    return np.load(file)


@EVERY_WORKLOAD
def test_torch_computes_the_same(torchs_results, workload):
    results = [torchs_results[f"{workload.name} {index}"] for index in range(4)]
    assert_agrees(workload.small(), results)


def test_the_reference_is_the_equation():
    workload = WORKLOADS[0].small()
    x, scale, bias, _ = workload.inputs(0)
    expected = wanted(workload)[0][0]
    found = contenders.reference(x, scale, bias, workload)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_on_a_gpu_a_call_takes_as_long_as_its_kernels():
    calls = []

    class Contender:
        def kernels(self, work):
            work()
            started = range(0, 2 * contenders.PROFILED_CALLS, 2)
            # Two kernels each, as the profiler lists them: by stream, not in order.
            return [(t + 1, 0.25) for t in started] + [(t, 0.5 + t) for t in started]

    found = contenders.times(lambda: calls.append(1), 0, Contender(), "gpu")
    assert found == [0.75 + t for t in range(0, 2 * contenders.PROFILED_CALLS, 2)]
    assert len(calls) == 1 + contenders.PROFILED_CALLS


@pytest.mark.parametrize("name", ["floor", "jgn"])
def test_the_profiler_sees_the_kernels_of_a_gpu_and_none_of_a_cpu(name):
    platform = jax.default_backend()
    contender = contenders.make(name, WORKLOADS[0].small(), "float32", 0, platform)
    worked = []
    found = contender.kernels(lambda: worked.append([call() for call in contender.calls.values()]))
    assert len(worked) == 1
    assert bool(found) == (platform == "gpu")


def test_a_profile_without_every_kernel_is_refused():
    assert contenders.seconds_of_calls([(1, 0.5), (0, 0.25)], 2) == [0.25, 0.5]
    for kernels in ([], [(0, 1.0)], [(0, 1.0)] * 3):
        with pytest.raises(RuntimeError, match=f"saw {len(kernels)} kernels in 2 equal calls"):
            contenders.seconds_of_calls(kernels, 2)


def test_torch_is_not_timed_on_another_device_than_jax():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("torch has a GPU")
    with pytest.raises(RuntimeError, match="torch must have JAX's device, a gpu: it has a CPU"):
        contenders.make("torch", WORKLOADS[0].small(), "float32", 0, "gpu")


def test_a_worker_tells_its_error_and_is_started_again_after_its_end():
    workload = WORKLOADS[0].small()
    options = {"dtype": "float32", "seed": 0, "platform": "cpu"}
    worker = Worker("jgn", {})
    try:
        with pytest.raises(WorkerError, match=r"^ValueError: num_groups must divide the channels"):
            worker.prepare(workload._replace(num_groups=7), **options)
        with pytest.raises(WorkerError, match=r"^KeyError: 'contender'$"):
            worker.ask(time="forward", seconds=0)
        # As the kernel ends one that takes all memory.
        worker._process.kill()
        with pytest.raises(WorkerError, match="its process ended with status -9"):
            worker.ask(time="forward", seconds=0)
        assert worker.prepare(workload, **options)["error"] < 1e-6
    finally:
        worker.close()


class Scripted:
    """Stands for a worker: answers with given times, and fails in a given turn of its own."""

    def __init__(self, contender, seconds, failing_turn=None):
        self.contender, self.asked = contender, []
        self._seconds, self._failing_turn = seconds, failing_turn

    def prepare(self, workload, **options):
        return {}

    def ask(self, time, seconds):
        self.asked.append(time)
        if len(self.asked) == self._failing_turn:
            raise WorkerError("out of memory")
        return [self._seconds, 2 * self._seconds, 3 * self._seconds]


def test_contenders_take_turns_and_one_that_fails_sits_out():
    workers = [Scripted("floor", 1.0), Scripted("jgn", 1.0), Scripted("flax", 4.0, failing_turn=3)]
    failed, results = {}, []
    options = {"dtype": "bfloat16", "platform": "cpu"}
    rounds = _measure(WORKLOADS[0], options, workers, 3, failed, results)
    turns = [[len(worker.asked) for worker in workers] for _ in rounds]
    assert turns == [[0, 0, 0], [4, 2, 2], [8, 4, 3], [12, 6, 3]]
    assert failed == {"flax, resnet-1, bfloat16": "out of memory"}
    assert results[0]["x_bytes"] == 2 * 8 * 56 * 56 * 64
    assert results[0]["contenders"].keys() == {"jgn"}
    assert results[0]["contenders"]["jgn"]["forward"] == {"best": 1, "median": 2, "spread": 2}
    assert results[0]["floor"].keys() == set(contenders.FLOORS)


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
        for name, contender in row["contenders"].items():
            # flax's variance is not as exact.
            assert contender["error"] < largest_error * (1 if name == "jgn" else 10)
            for call in ("forward", "forward and backward"):
                assert 0 < contender[call]["best"] <= contender[call]["median"]
                assert contender[call]["spread"] >= 0
        if "torch" in peers:
            layouts = {"contiguous_format", "channels_last"}
            assert set(row["contenders"]["torch"]["layouts"].values()) <= layouts
        for name in ("jgn", "flax"):
            facts = row["contenders"][name]
            assert 0 < facts["forward_temporary_bytes"] <= facts["temporary_bytes"]
            assert facts["compile_seconds"] > 0
        assert row["contenders"]["jgn"]["kept_with_silu"] < 1.02
        assert row["contenders"]["flax"]["kept_with_silu"] > 3
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG")


def report_of(*results, absent=(), failed=None):
    return {
        "environment": {"device": "cpu"},
        "peers": ["flax", "torch"],
        "absent": list(absent),
        "failed": failed or {},
        "results": list(results),
    }


def test_a_peer_that_is_absent_or_fails_is_named():
    failed = {"flax, vae, float32": "out of memory"}
    shown = report.table(report_of(result(jgn=1.0), absent=["haiku"], failed=failed))
    assert "haiku is not installed" in shown
    assert "flax, vae, float32 failed: out of memory" in shown


def test_the_table_shows_times_bandwidths_and_ratios():
    shown = report.table(report_of(result(jgn=0.002, flax=0.008, copy=0.001)))
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    # 2 MB in 1 ms, and 3 MB in 2 ms.
    assert "w copy 1000.0 / 2000000.0 / 500000.0 2.0" in lines
    assert "w jgn 2000.0 / 2000000.0 / 500000.0 1.5" in lines
    # Nothing is known of backward, nor of torch; three passes take 1 s each.
    assert "w 1.0 0.25 / – 0.00 75 / –" in lines
    assert "torch" not in shown


def test_a_chart_does_without_what_failed():
    pytest.importorskip("matplotlib")
    picture = report.chart(report_of(result(jgn=1.0, flax=2.0), result(flax=2.0)), "svg")
    assert b"</svg>" in picture


def test_the_list_names_every_workload(capsys):
    assert main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["workload", *(workload.name for workload in WORKLOADS)]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "b.json"
    _write(file, b"first")
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _write(file, b"second")
    assert file.read_bytes() == b"first"
    assert list(tmp_path.iterdir()) == [file]


def test_missing_tools_are_told_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["--plot", "b.png"])
    assert "tqdm is not installed; pip install 'jgn[bench]'" in capsys.readouterr().err


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
