"""The benchmark: its arithmetic, its contenders' agreement, and its command."""

import functools
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from oracle import Oracle, tolerance

from jgn.bench import __main__ as command
from jgn.bench import contenders, report
from jgn.bench.__main__ import Worker, WorkerError, _measure, main
from jgn.bench.contenders import BOTH, FORWARD
from jgn.bench.workloads import WORKLOADS

EVERY_CONTENDER = pytest.mark.parametrize("name", ["jgn", "flax", "haiku", "equinox"])
SMALL = {workload.name: workload.small() for workload in WORKLOADS}
EVERY_WORKLOAD = pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: workload.name)


def test_a_summary_is_best_median_and_interquartile_range():
    found = report.summary([5.0, 1.0, 2.0, 4.0, 3.0])
    assert found == {"best": 1.0, "median": 3.0, "spread": 2.0}
    with pytest.raises(ValueError, match="got 1"):
        report.summary([1.0])


def measured_in_notebook(name):
    written = pathlib.Path(__file__).parents[1] / "notebooks" / name
    results = json.loads(written.read_text())["results"]
    return {(result["network"], result["dtype"]): result for result in results}


def ratios(result, peer):
    return [f"{report.ratio(result, peer, call):.2f}" for call in (FORWARD, BOTH)]


def test_the_readme_s_tables_are_what_the_notebook_shows():
    readme = (pathlib.Path(__file__).parents[1] / "README.md").read_text().splitlines()
    on_cpu = measured_in_notebook("4_performance.json")
    means = [
        f"{report.geometric_mean(report.ratio(r, 'flax', call) for r in on_cpu.values()):.2f}"
        for call in (FORWARD, BOTH)
    ]
    wanted = [("geometric mean", "", *means)]
    for workload in WORKLOADS:
        groups = f"{workload.num_groups} group{'s' if workload.num_groups > 1 else ''}"
        shape = "×".join(map(str, workload.shape))
        key = workload.network, "float32"
        wanted.append((workload.network, f"{shape}, {groups}", *ratios(on_cpu[key], "flax")))

    on_gpu = measured_in_notebook("4_performance_gpu.json")
    large = [result for result in on_gpu.values() if result["x_bytes"] > 8e6]
    of_float32 = [result for result in large if result["dtype"] == "float32"]
    for result in of_float32:
        dtypes = result, on_gpu[result["network"], "bfloat16"]
        calls = [result["contenders"]["jgn"][call]["best"] for call in (FORWARD, BOTH)]
        shares = [report.share_of_copy(result, "jgn", call) for call in (FORWARD, BOTH)]
        cells = [ratios(each, peer) for peer in ("flax", "torch") for each in dtypes]
        cells += [[f"{1e6 * seconds:.0f}" for seconds in calls]]
        cells += [[f"{100 * share:.0f}" for share in shares]]
        shape = "×".join(map(str, result["shape"]))
        wanted.append((result["network"], shape, *map(" / ".join, cells)))

    measured = {row[0] for row in wanted}
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in readme]
    assert sorted(row for row in rows if row[0] in measured) == sorted(wanted)


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
        assert (np.abs(np.asarray(given) - expected) <= atol).all()


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
    workload = SMALL["resnet-1"]
    x, scale, bias, _ = workload.inputs(0)
    expected = wanted(workload)[0][0]
    found = contenders.reference(x, scale, bias, workload)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_every_pass_of_the_floor_does_what_its_name_says():
    workload = SMALL["resnet-2-first"]
    x, scale, bias, _ = workload.inputs(0)
    floor = contenders.make("floor", workload, "float32", 0, jax.default_backend())
    x = x.astype(np.float64)
    expected = {
        "copy": -x,
        "sum": x.sum((2, 3)),
        "sum of squares": (x**2).sum((2, 3)),
        "multiply-add": x * scale[:, None, None] + bias[:, None, None],
    }
    for name, call in floor.calls.items():
        atol = tolerance("float32", x[0, 0].size) * np.abs(expected[name]).max()
        np.testing.assert_allclose(call(), expected[name], rtol=0, atol=atol, err_msg=name)


def test_the_cotangent_comes_of_y(monkeypatch):
    # Read before XLA optimizes it: the kernels of a CPU are the same either way.
    programs = []
    compiled = jax.stages.Lowered.compile

    def recorded(lowered):
        programs.append(lowered.as_text())
        return compiled(lowered)

    monkeypatch.setattr(jax.stages.Lowered, "compile", recorded)
    monkeypatch.setitem(contenders._JAX, "jgn", lambda _: lambda x, scale, bias: x * scale + bias)
    contenders.make("jgn", SMALL["resnet-1"], "float32", 0, jax.default_backend())
    (both,) = (program for program in programs if "%arg3" in program)
    assert both.count("%arg3") == 2, "an argument, and that of one operation"
    y = re.search(r"(%\d+):2 = stablehlo.optimization_barrier %\d+, %arg3", both)
    assert y, both
    assert f"return {y[1]}#0" in both


def test_temporary_bytes_are_those_of_each_program():
    # flax's backward pass has arrays of x's size between kernels, its forward pass has none.
    workload = SMALL["pyramid-5"]
    facts = contenders.make("flax", workload, "float32", 0, jax.default_backend()).facts()
    assert facts["forward_temporary_bytes"] < facts["temporary_bytes"]


def test_torch_is_called_in_whichever_layout_is_faster(monkeypatch):
    pytest.importorskip("torch")

    def called(liked):
        return lambda torch, x, cotangent: x.is_contiguous() == cotangent.is_contiguous() == liked

    monkeypatch.setattr(contenders.Torch, "_forward", called(True))
    monkeypatch.setattr(contenders.Torch, "_both", called(False))
    # Only the best time counts.
    monkeypatch.setattr(contenders, "times", lambda call, *_: [1.0, 9.0] if call() else [2.0])
    torch = contenders.make("torch", SMALL["resnet-1"], "float32", 0, "cpu")
    assert all(call() for call in torch.calls.values())
    assert list(torch.facts()["layouts"].values()) == ["contiguous_format", "channels_last"]


def test_on_a_cpu_the_first_call_is_not_counted(monkeypatch):
    clock = [0.0]
    durations = iter([10.0, 1.0, 1.0, 1.0])

    def call():
        clock[0] += next(durations)

    monkeypatch.setattr(contenders.time, "perf_counter", lambda: clock[0])
    assert contenders.times(call, 0, None, "cpu") == [1.0, 1.0, 1.0]


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
    contender = contenders.make(name, SMALL["resnet-1"], "float32", 0, platform)
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
        contenders.make("torch", SMALL["resnet-1"], "float32", 0, "gpu")


def test_a_worker_tells_its_error_and_is_started_again_after_its_end():
    workload = SMALL["resnet-1"]
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


def test_a_worker_has_the_settings_it_is_given():
    worker = Worker("jgn", {"JAX_PLATFORMS": "nonesuch"})
    try:
        with pytest.raises(WorkerError, match="nonesuch"):
            worker.ask(device="")
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
    failed, turns = {}, []
    options = {"dtype": "bfloat16", "platform": "cpu"}

    def tick():
        turns.append([len(worker.asked) for worker in workers])

    result = _measure(WORKLOADS[0], options, workers, 3, failed, tick)
    assert turns == [[0, 0, 0], [4, 2, 2], [8, 4, 3], [12, 6, 3]]
    assert failed == {"flax, resnet-1, bfloat16": "out of memory"}
    assert result["x_bytes"] == 2 * 8 * 56 * 56 * 64
    assert result["contenders"].keys() == {"jgn"}
    assert result["contenders"]["jgn"]["forward"] == {"best": 1, "median": 2, "spread": 2}
    assert result["floor"].keys() == set(contenders.FLOORS)


def compared(monkeypatch, platform, peers=None):
    """What is reported of scripted workers on a device, and the settings that each started with."""
    settings_of = {}

    class OnDevice(Scripted):
        def __init__(self, contender, settings):
            super().__init__(contender, 1.0)
            settings_of[contender] = settings

        def ask(self, **request):
            return {"platform": platform} if "device" in request else super().ask(**request)

        def close(self):
            pass

    monkeypatch.setattr(command, "Worker", OnDevice)
    return command.compare(WORKLOADS[:1], ["float32"], peers, 1), settings_of


def test_every_process_has_the_settings_and_torchs_on_a_cpu_its_own(monkeypatch):
    _, found = compared(monkeypatch, "cpu", ["flax", "torch"])
    bound = {**command.SETTINGS, **command.TORCH_SETTINGS}
    assert found == {**dict.fromkeys(("floor", "jgn", "flax"), command.SETTINGS), "torch": bound}
    _, found = compared(monkeypatch, "gpu", ["torch"])
    assert found["torch"] == command.SETTINGS


def test_compiled_torch_is_a_peer_on_a_gpu_only_unless_named(monkeypatch):
    monkeypatch.setattr(command, "is_installed", lambda name: True)
    for platform, peers, expected in (
        ("gpu", None, list(contenders.PEERS)),
        ("cpu", None, [name for name in contenders.PEERS if name != "torch-compiled"]),
        ("cpu", ["torch-compiled"], ["torch-compiled"]),
    ):
        assert compared(monkeypatch, platform, peers)[0]["peers"] == expected


def test_a_package_that_is_missing_is_absent_once(monkeypatch):
    monkeypatch.setattr(command, "is_installed", lambda name: not name.startswith("torch"))
    assert compared(monkeypatch, "cpu")[0]["absent"] == ["torch"]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_the_cores_are_those_that_it_may_use(monkeypatch):
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        assert compared(monkeypatch, "cpu")[0]["environment"]["cores"] == 1
    finally:
        os.sched_setaffinity(0, allowed)


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


def test_the_table_shows_means_and_what_is_known_beside_times():
    def facts(factor):
        return {
            "error": factor * 1e-7,
            "kept": factor,
            "kept_with_silu": 2 * factor,
            "forward_temporary_bytes": factor * 1_000_000,
            "temporary_bytes": factor * 3_000_000,
            "compile_seconds": factor,
        }

    rows = []
    for factor in (1, 2, 9):
        row = result(jgn=3.0 * factor, flax=4.0)
        for name, contender in row["contenders"].items():
            contender["forward and backward"] = {
                "best": {"jgn": 3.0, "flax": 12.0}[name],
                "median": 12.0,
                "spread": 0.5,
            }
            contender.update(facts(factor) if name == "jgn" else {"error": 1e-6})
        rows.append(row)
    shown = report.table({**report_of(*rows), "peers": ["flax"]})
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    # (1 · 2 · 9)^(1/3) = 2.62 times 3/4, and that over three passes of a second each.
    assert "geometric mean 1.97 / 0.25 2.62" in lines
    assert "jgn 9.0e-07 9.00 x 18.00 x 9.00 x / 27.00 x 2.00 s" in lines
    assert "flax 1.0e-06" in lines


def test_a_chart_names_the_peer_of_each_panel(monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    monkeypatch.setattr(figure, "savefig", lambda drawn, *_, **__: figures.append(drawn))
    figures = []
    report.chart(report_of(result(jgn=1.0, flax=2.0, torch=4.0)), "svg")
    panels = {panel.get_title(): panel for panel in figures[0].axes}
    assert list(panels) == ["flax", "torch"]
    assert [panel.patches[0].get_width() for panel in panels.values()] == [0.5, 0.25]


def test_a_chart_does_without_what_failed():
    pytest.importorskip("matplotlib")
    picture = report.chart(report_of(result(jgn=1.0, flax=2.0), result(flax=2.0)), "svg")
    assert b"</svg>" in picture


def test_the_list_names_every_workload(capsys):
    assert main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["workload", *(workload.name for workload in WORKLOADS)]


def test_a_device_is_written_into_though_its_directory_takes_no_file(tmp_path, monkeypatch):
    measured = report_of(result(jgn=1.0))
    monkeypatch.setattr(command, "compare", lambda *_: measured)
    monkeypatch.setattr(os, "access", lambda path, _: not os.path.isdir(path))
    pipe = tmp_path / "pipe"  # In place of a device, which a broken program could replace.
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)) as reader:
        assert main(["--json", str(pipe)]) == 0
        assert json.load(reader) == measured
    assert pipe.is_fifo()


@pytest.mark.parametrize("lost", [["b.json"], ["b.svg"], ["b.json", "b.svg"]], ids=str)
def test_a_file_that_cannot_be_written_is_told_and_the_other_is_written(
    tmp_path, monkeypatch, capsys, lost
):
    pytest.importorskip("matplotlib")
    directory = tmp_path / "directory"
    directory.mkdir()

    def compare(*_):
        directory.rmdir()
        return report_of(result(jgn=1.0, flax=2.0))

    monkeypatch.setattr(command, "compare", compare)
    json_file, plot_file = (
        (directory if name in lost else tmp_path) / name for name in ("b.json", "b.svg")
    )
    assert main(["--json", str(json_file), "--plot", str(plot_file)]) == 1
    told = capsys.readouterr().err
    for file in (json_file, plot_file):
        assert file.exists() == (file.name not in lost)
        assert (f"cannot write {file}: " in told) == (file.name in lost)


def test_what_is_measured_is_kept_though_nobody_reads_the_tables(tmp_path, monkeypatch):
    measured = report_of(result(jgn=1.0))
    monkeypatch.setattr(command, "compare", lambda *_: measured)
    monkeypatch.setattr(report, "table", lambda _: 1 / 0)  # In place of a pipe that is closed.
    with pytest.raises(ZeroDivisionError):
        main(["--json", str(tmp_path / "b.json")])
    assert json.loads((tmp_path / "b.json").read_text()) == measured


@pytest.mark.parametrize(("failed", "status"), [({}, 0), ({"flax, w, float32": "no memory"}, 1)])
def test_the_exit_status_tells_of_a_contender_that_failed(monkeypatch, failed, status):
    measured = report_of(result(jgn=1.0), failed=failed)
    monkeypatch.setattr(command, "compare", lambda *_: measured)
    assert main([]) == status


def test_a_stop_by_hand_ends_the_command_without_a_file(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "compare", stopped)
    # Uncaught here, a KeyboardInterrupt would end pytest, too.
    with pytest.raises((SystemExit, KeyboardInterrupt), match=r"^130$"):
        main(["--json", str(tmp_path / "b.json")])
    assert "Stopped; nothing is written." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


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
        (["--json", "."], ". cannot be written."),
        (["--plot", "b.doc"], "--plot must end in .png, .svg or .pdf: got b.doc."),
    ],
    ids=str,
)
def test_bad_options_are_told_before_any_work(monkeypatch, capsys, arguments, text):
    monkeypatch.setattr(command, "compare", None)
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert text in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_told_before_any_work(monkeypatch, capsys):
    monkeypatch.setattr(command, "compare", None)
    monkeypatch.setattr(command, "is_installed", lambda name: name != "haiku")
    with pytest.raises(SystemExit, match="2"):
        main(["--peers", "flax", "haiku"])
    assert "haiku is not installed: the package 'haiku' is missing." in capsys.readouterr().err


def test_what_is_named_twice_is_measured_once(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    asked = []

    def compare(workloads, dtypes, peers, rounds):
        asked.append(([workload.name for workload in workloads], dtypes, peers, rounds))
        return report_of(result(jgn=1.0, flax=2.0))

    monkeypatch.setattr(command, "compare", compare)
    main(
        [
            *("--workloads", "pyramid-5", "unet-top", "pyramid-5", "--peers", "flax", "flax"),
            *(
                "--dtype",
                "bfloat16",
                "bfloat16",
                "--rounds",
                "3",
                "--plot",
                str(tmp_path / "b.PNG"),
            ),
        ]
    )
    assert asked == [(["unet-top", "pyramid-5"], ["bfloat16"], ["flax"], 3)]
    assert (tmp_path / "b.PNG").read_bytes().startswith(b"\x89PNG")


def test_a_directory_that_takes_no_file_is_told_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "compare", None)
    monkeypatch.setattr(os, "access", lambda *_: False)  # Root may write anywhere.
    with pytest.raises(SystemExit, match="2"):
        main(["--json", str(tmp_path / "b.json")])
    assert f"{tmp_path / 'b.json'} cannot be written." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["b.svg", "link"])
def test_one_file_for_both_is_told_before_any_work(tmp_path, monkeypatch, capsys, name):
    monkeypatch.setattr(command, "compare", None)
    json_file, plot_file = tmp_path / name, tmp_path / "b.svg"
    (tmp_path / "link").symlink_to("b.svg")
    with pytest.raises(SystemExit, match="2"):
        main(["--json", str(json_file), "--plot", str(plot_file)])
    told = capsys.readouterr().err
    assert f"--json and --plot must be two files: got {json_file} and {plot_file}." in told
