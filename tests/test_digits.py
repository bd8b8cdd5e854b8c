"""The digits example: it learns, goes on to the bit where it was stopped, and loses nothing."""

import asyncio
import contextlib
import errno
import gc
import importlib.util
import io
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jgn import examples
from jgn.examples.digits import (
    NORMS,
    Network,
    correct_predictions,
    create_state,
    load,
    shuffled_batches,
    steps_per_epoch,
    train_step,
)
from jgn.examples.digits import __main__ as program
from jgn.examples.digits.__main__ import main
from jgn.examples.digits.checkpoints import Finished, Run, RunError, checkpoints
from jgn.examples.digits.training import shifted

# Of several workers one runs these tests, with what its first run has compiled.
pytestmark = pytest.mark.xdist_group("digits")

SETTINGS = {
    "norm": "group",
    "groups": 4,
    "batch_size": 256,
    "epochs": 4,
    "learning_rate": 0.003,
    "seed": 1,
}


@pytest.fixture(autouse=True)
def implicit_promotion():
    """optax's schedules raise a float to the power of an integer."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def command(out, **changes):
    options = [
        word
        for name, value in {**SETTINGS, **changes}.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return [sys.executable, "-m", "jgn.examples.digits", "--out", str(out), *options]


NEEDS_TWO_DEVICES = pytest.mark.skipif(
    jax.device_count() < 2, reason="needs two devices; a CPU simulates them, see conftest.py"
)
# A process of its own must not inherit the eight devices of the other tests.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
# Half of a run is compiling. Most runs take from here what the first of them has compiled. (Each
# time jaxlib 0.10.0 complains that it is of another machine, which it is not.)
COMPILED = tempfile.TemporaryDirectory()
COMPILED_BEFORE = {
    **ENVIRONMENT,
    "JAX_COMPILATION_CACHE_DIR": COMPILED.name,
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def run(out, *, below=(), environment=COMPILED_BEFORE, **changes):
    return subprocess.run(
        [*below, *command(out, **changes)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )


def stop(out, after_epoch, stop_signal, delay=0.0, **changes):
    """Runs until an epoch is reported and a delay has passed; then sends the signal."""
    process = subprocess.Popen(
        command(out, **changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=COMPILED_BEFORE,
    )
    for line in process.stdout:
        if line.split()[:2] == ["epoch", str(after_epoch)]:
            break
    time.sleep(delay)
    process.send_signal(stop_signal)
    _, errors = process.communicate(timeout=120)
    return process.returncode, errors


def first_state(**changes):
    settings = {**SETTINGS, **changes}
    steps = steps_per_epoch(1437, settings["batch_size"]) * settings["epochs"]
    network = Network(settings["norm"], settings["groups"])
    return create_state(network, jax.random.key(0), settings["learning_rate"], steps)


class Linear(nn.Module):
    """Compiles at once."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(10)(x.reshape(len(x), -1))


def linear_state():
    return create_state(Linear(), jax.random.key(0), 1e-2, 100)


def finished(out):
    with Run(out, SETTINGS) as directory:
        return directory.restore(first_state())


def finished_or_refused(out):
    try:
        return finished(out)
    except RunError as error:
        return str(error)


def contents(directory):
    return {
        path.relative_to(directory): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Compiled anew: the others' bits are those of another compilation."""
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    result = run(out, environment=ENVIRONMENT)
    assert result.returncode == 0, result.stderr
    return out


def assert_same_end(out, uninterrupted):
    chex.assert_trees_all_equal(finished(out).state.params, finished(uninterrupted).state.params)
    assert (out / "metrics.json").read_bytes() == (uninterrupted / "metrics.json").read_bytes()


def test_it_passes_97_percent_within_two_minutes(tmp_path):
    start = time.monotonic()
    arguments = [sys.executable, "-m", "jgn.examples.digits", "--out", str(tmp_path / "run")]
    result = subprocess.run(arguments, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert time.monotonic() - start < 120
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["history"][-1]["test_accuracy"] > 0.97
    assert f"test accuracy {metrics['history'][-1]['test_accuracy']:.2%}" in result.stdout
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


# In the middle of an epoch, about when it is saved, and shortly after.
@pytest.mark.parametrize("delay", [0.05, 0.4])
def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path, uninterrupted, delay):
    out = tmp_path / "run"
    code, _ = stop(out, 1, signal.SIGKILL, delay)
    assert code == -signal.SIGKILL
    assert len(finished(out).history) >= 1, "the epoch that it reported is kept"
    assert not (out / "metrics.json").exists()
    result = run(out)
    assert "going on after epoch" in result.stdout
    assert_same_end(out, uninterrupted)


def test_killed_at_its_very_start_it_starts_again(tmp_path, uninterrupted):
    out = tmp_path / "run"
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, env=COMPILED_BEFORE)
    while not (out / "settings.json").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert run(out).returncode == 0
    assert_same_end(out, uninterrupted)


@pytest.fixture
def interrupts():
    """Answered, here and in what is started, even if a shell runs the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_ends_it_with_130_and_keeps_what_is_done(tmp_path):
    out = tmp_path / "run"
    code, errors = stop(out, 1, signal.SIGINT, epochs=200)
    assert code == 130
    assert errors == (
        f"stopped; the finished epochs are kept in {out}, "
        "and the same command goes on from there.\n"
    )
    with Run(out, {**SETTINGS, "epochs": 200}) as directory:
        assert directory.restore(first_state(epochs=200)).history


@pytest.fixture
def run_with_step(tmp_path, monkeypatch, capsys):
    """Runs two epochs of two batches here, with a step that trains nothing; what it says comes."""

    def run_with(step):
        monkeypatch.setattr(program, "_train_step", step)
        monkeypatch.setattr(program, "_correct_predictions", lambda *_: 36)
        options = {"norm": "none", "epochs": 2, "batch_size": 512, "seed": 1}
        words = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        return main([*words, f"--out={tmp_path / 'run'}"]), capsys.readouterr().err

    return run_with


def nothing_learned(state, key, images, labels):
    return state, 2.5, 51


@pytest.mark.usefixtures("interrupts")
def test_an_interrupt_before_an_epoch_is_finished_promises_none(tmp_path, run_with_step):
    def step(*batch):
        signal.raise_signal(signal.SIGINT)
        return nothing_learned(*batch)

    stopped = "stopped before the first epoch was finished; the same command starts again.\n"
    assert run_with_step(step) == (130, stopped)


@pytest.mark.usefixtures("interrupts")
def test_a_second_interrupt_does_not_wait_for_the_step(run_with_step):
    passed = []

    def step(*batch):
        for number in ("first", "second"):
            signal.raise_signal(signal.SIGINT)
            passed.append(number)
        return nothing_learned(*batch)

    code, _ = run_with_step(step)
    assert (code, passed) == (130, ["first"])


def test_ignored_interrupts_stay_ignored(run_with_step):
    """As of what a shell runs in the background."""

    def step(*batch):
        signal.raise_signal(signal.SIGINT)
        return nothing_learned(*batch)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, _ = run_with_step(step)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 0


def failing(*_):
    raise ZeroDivisionError


@pytest.mark.parametrize("step", [nothing_learned, failing])
def test_interrupts_are_afterwards_as_they_were(run_with_step, step):
    def former(*_):
        pass

    before = signal.signal(signal.SIGINT, former)
    try:
        with contextlib.suppress(ZeroDivisionError):
            run_with_step(step)
        assert signal.getsignal(signal.SIGINT) is former
    finally:
        signal.signal(signal.SIGINT, before)


class Left(io.StringIO):
    """Where the lines go once their reader, such as `head`, has left."""

    def write(self, _):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def test_a_reader_who_leaves_ends_it_and_the_epoch_is_kept(tmp_path, monkeypatch, run_with_step):
    monkeypatch.setattr(sys, "stdout", Left())
    assert run_with_step(nothing_learned) == (1, "error: [Errno 32] Broken pipe\n")
    assert [path.name for path in checkpoints(tmp_path / "run")] == ["1"]


def test_more_devices_than_there_are_is_told_where_jax_has_started(tmp_path, capsys):
    devices = 2 * jax.device_count()
    with pytest.raises(SystemExit, match="2"):
        main([f"--devices={devices}", f"--batch-size={devices}", f"--out={tmp_path / 'run'}"])
    assert f"must be at most the {devices // 2} present: got {devices}." in capsys.readouterr().err


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tqdm" else name)
    message = r"^tqdm is not installed; pip install 'jgn\[examples\]' brings it\.$"
    with pytest.raises(ModuleNotFoundError, match=message):
        importlib.reload(examples)


def test_another_thread_may_train(run_with_step):
    ends = []

    def train():
        with jax.numpy_dtype_promotion("standard"):
            ends.append(run_with_step(nothing_learned))

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert ends == [(0, "")]


@pytest.mark.parametrize("loss", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_ends_it_and_keeps_the_epochs_before(
    tmp_path, run_with_step, loss
):
    losses = iter((2.5, 2.5, 2.5, loss))

    def step(state, key, images, labels):
        return state, next(losses), 51

    assert run_with_step(step) == (
        1,
        "error: the loss is not finite in epoch 2; "
        "choose a lower --learning-rate, and another --out.\n",
    )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["1"]
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_each_epoch_has_an_order_and_a_key_of_its_own(run_with_step):
    keys, firsts = [], []

    def step(state, key, images, labels):
        keys.append(tuple(jax.random.key_data(key).tolist()))
        firsts.append(np.asarray(images[0]))
        return nothing_learned(state, key, images, labels)

    assert run_with_step(step) == (0, "")
    assert len(set(keys)) == 2
    assert len(np.unique(firsts, axis=0)) == 4


def test_a_finished_run_stays_as_it_is(uninterrupted):
    before = contents(uninterrupted / "checkpoints")
    result = run(uninterrupted)
    assert result.returncode == 0
    assert "going on after epoch 4 of 4" in result.stdout
    assert contents(uninterrupted / "checkpoints") == before


@NEEDS_TWO_DEVICES
def test_on_two_devices_it_learns_the_same_and_goes_on_with_one(tmp_path, uninterrupted):
    out = tmp_path / "run"
    stop(out, 2, signal.SIGKILL, devices=2)
    result = run(out)
    assert "going on after epoch" in result.stdout, result.stderr
    two, one = finished(out), finished(uninterrupted)
    # The batch's mean is summed in another order; 20 steps of AdamW let that grow.
    chex.assert_trees_all_close(two.state.params, one.state.params, atol=2e-3)
    losses = [[line["loss"] for line in end.history] for end in (two, one)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@NEEDS_TWO_DEVICES
def test_each_device_computes_its_part_of_the_batch(tmp_path):
    script = (
        "import jax\n"
        "from jgn.examples.digits import __main__ as program\n"
        "def step(state, key, *batch):\n"
        "    for array in jax.tree.leaves((state, batch)):\n"
        "        assert len(array.sharding.device_set) == 2\n"
        "    assert [part.sharding.shard_shape(part.shape)[0] for part in batch] == [512, 512]\n"
        "    print('split')\n"
        "    raise KeyboardInterrupt\n"
        "program._train_step = step\n"
        f"program.main(['--out', {str(tmp_path / 'run')!r}, '--norm', 'none',\n"
        "    '--batch-size', '1024', '--devices', '2'])\n"
    )
    arguments = [sys.executable, "-c", script]
    result = subprocess.run(
        arguments, capture_output=True, text=True, env=COMPILED_BEFORE, timeout=120, check=False
    )
    assert result.stdout == "split\n", result.stderr


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compilers write files of their own")
def test_a_full_disk_ends_it_and_keeps_the_epochs_before(tmp_path, uninterrupted):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    for epoch in ("3", "4"):
        shutil.rmtree(out / "checkpoints" / epoch)
    (out / "metrics.json").unlink()
    epochs = len(finished(out).history)

    no_large_files = ("sh", "-c", 'ulimit -f 10; exec "$@"', "sh")
    # A compiled program could not be kept either, about which JAX would warn.
    result = run(out, below=no_large_files, environment=ENVIRONMENT)
    assert result.returncode == 1
    assert result.stderr == cannot_save(epochs + 1, out, "File too large")
    assert run(out).returncode == 0
    assert_same_end(out, uninterrupted)


def cannot_save(epoch, out, reason):
    return (
        f"error: cannot save epoch {epoch} in {out}: {reason}; "
        "the epochs before it are kept, and the same command goes on from there.\n"
    )


# Mounts of its own, which end with the process; those who are not root become it in there.
NAMESPACE = ("unshare", "-m" if os.geteuid() == 0 else "-rm", "sh", "-ec")


@pytest.fixture
def mounts(tmp_path):
    """Skips where no mount can be made."""
    try:
        check = [*NAMESPACE, 'mount -t tmpfs tmpfs "$0"', str(tmp_path)]
        subprocess.run(check, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no mount namespaces: {getattr(error, 'stderr', None) or error}")


def size(directory):
    return sum(len(content) for content in contents(directory).values())


def test_a_file_system_without_room_keeps_the_epochs_before(tmp_path, uninterrupted, mounts):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    room = int(1.5 * size(uninterrupted / "checkpoints" / "4"))
    on_a_small_disk = (
        'out=$0 kept=$1; shift; mount -t tmpfs -o size=%s tmpfs "$out"; '
        'code=0; "$@" || code=$?; cp -r "$out/run" "$kept"; exit $code'
    )
    below = (*NAMESPACE, on_a_small_disk % room, str(disk), str(kept))
    result = run(disk / "run", below=below)
    assert result.returncode == 1
    assert result.stderr == cannot_save(2, disk / "run", "No space left on device")
    assert len(finished(kept).history) == 1
    assert run(kept).returncode == 0
    assert_same_end(kept, uninterrupted)


def test_what_else_failed_in_a_save_is_not_told(tmp_path, monkeypatch, caplog):
    """By asyncio, some time later, if more than one of the files finds no room."""

    async def fails_twice():
        asyncio.get_running_loop().create_future().set_exception(OSError("another"))
        raise OSError("the first")

    with Run(tmp_path, SETTINGS) as directory:
        monkeypatch.setattr(directory._manager, "save", lambda *_, **__: asyncio.run(fails_twice()))
        with pytest.raises(RunError, match="the first"):
            directory.save(Finished(linear_state(), [{}]))
        gc.collect()
    assert not caplog.records


def by_its_mode(out, _):
    for directory in (out, out / "checkpoints"):
        directory.chmod(0o555)
    if os.geteuid() != 0:
        return (), "Permission denied"
    if shutil.which("setpriv") is None:
        pytest.skip("root may write everywhere")
    return ("setpriv", "--bounding-set", "-dac_override"), "Permission denied"


def by_its_mount(out, request):
    request.getfixturevalue("mounts")
    read_only = 'mount --bind "$0" "$0"; mount -o remount,bind,ro "$0"; exec "$@"'
    return (*NAMESPACE, read_only, str(out)), "Read-only file system"


@pytest.mark.parametrize("protected", [by_its_mode, by_its_mount])
def test_a_read_only_directory_is_named_and_stays_as_it_is(
    tmp_path, uninterrupted, protected, request
):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    shutil.rmtree(out / "checkpoints" / "4")
    (out / "metrics.json").unlink()
    before = contents(out)
    below, reason = protected(out, request)
    result = run(out, below=below)
    assert result.returncode == 1
    assert result.stdout == f"going on after epoch 3 of 4 in {out}\n"
    place = out / "checkpoints" / "4.orbax-checkpoint-tmp"
    assert re.fullmatch(
        re.escape(cannot_save(4, out, "…")).replace("…", rf"\w+: .*{reason}: '{place}'"),
        result.stderr,
    )
    result = run(out / "new", below=below)
    assert result.returncode == 1
    assert re.fullmatch(
        rf"error: cannot write to {out}/new: .*{reason}: '{out}/new'; choose another with --out.\n",
        result.stderr,
    )
    assert contents(out) == before


def refused(capsys, *arguments):
    """What the command says, in this process, when it does not even start."""
    with pytest.raises(SystemExit) as end:
        raise SystemExit(main([str(argument) for argument in arguments]))
    return end.value.code, capsys.readouterr().err


def settings_as_options(**changes):
    return command("", **changes)[5:]


def test_a_foreign_directory_is_refused_and_untouched(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("years of work")
    code, errors = refused(capsys, "--out", tmp_path)
    assert code == 1
    assert errors == (
        f"error: {tmp_path} is no run's directory: it has no settings.json, but thesis.txt; "
        "choose another with --out.\n"
    )
    assert contents(tmp_path) == {pathlib.Path("thesis.txt"): b"years of work"}


def test_other_settings_are_refused(uninterrupted, capsys):
    before = contents(uninterrupted)
    options = settings_as_options(epochs=9, seed=2)
    code, errors = refused(capsys, "--out", uninterrupted, *options)
    assert code == 1
    assert "epochs was 4 and is now 9, seed was 1 and is now 2; repeat its settings" in errors
    assert contents(uninterrupted) == before


def test_a_file_in_place_of_the_checkpoints_is_named(tmp_path, capsys):
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "checkpoints").touch()
    code, errors = refused(capsys, "--out", tmp_path, *settings_as_options())
    assert code == 1
    assert errors == (
        f"error: cannot write to {tmp_path}: [Errno 17] File exists: '{tmp_path}/checkpoints'; "
        "choose another with --out.\n"
    )


def test_a_stray_checkpoint_is_named_as_it_is(tmp_path, capsys):
    (tmp_path / "settings.json").write_text(json.dumps(SETTINGS))
    (tmp_path / "checkpoints" / "03").mkdir(parents=True)
    code, errors = refused(capsys, "--out", tmp_path, *settings_as_options())
    assert code == 1
    assert errors == (
        "error: the checkpoint of epoch 3 is damaged: its files are not a whole checkpoint; "
        f"remove {tmp_path}/checkpoints/03 to go on from the one before it.\n"
    )


def test_what_a_killed_save_left_is_removed(tmp_path):
    left = tmp_path / "run" / "checkpoints" / "2.orbax-checkpoint-tmp"
    with Run(tmp_path / "run", SETTINGS):
        left.mkdir()
    with Run(tmp_path / "run", SETTINGS) as directory:
        directory.save(Finished(linear_state(), [{"loss": 0.1}]))  # At the latest now.
        assert not left.exists()


def test_a_file_that_finds_no_room_leaves_the_one_before_it(tmp_path):
    with Run(tmp_path / "run", SETTINGS) as directory:
        directory.write("metrics.json", b"former")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3, limits[1]))
        try:
            with pytest.raises(RunError, match=r"^cannot write metrics.json in .*File too large"):
                directory.write("metrics.json", b"latter")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "run" / "metrics.json").read_bytes() == b"former"


def test_damaged_settings_are_refused(tmp_path, capsys):
    for damage in (b"", b'{"norm": "gro', b"[1]", b"{}"):
        (tmp_path / "settings.json").write_bytes(damage)
        code, errors = refused(capsys, "--out", tmp_path)
        assert code == 1
        assert errors.startswith(f"error: {tmp_path}/settings.json is damaged (")
        assert contents(tmp_path) == {pathlib.Path("settings.json"): damage}


def test_a_directory_that_cannot_be_written_is_named(tmp_path, capsys):
    (tmp_path / "file").touch()
    code, errors = refused(capsys, "--out", tmp_path / "file" / "run")
    assert code == 1
    assert errors.startswith(f"error: cannot write to {tmp_path}/file/run: ")
    assert errors.endswith("; choose another with --out.\n")


# tensorstore's readers outlive orbax's event loop when one of them fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_no_damage_to_a_checkpoint_gives_a_wrong_result(tmp_path, uninterrupted):
    wanted = finished(uninterrupted)
    newest = pathlib.Path("checkpoints") / "4"
    files = [path for path in contents(uninterrupted / newest) if path.parts]
    refusals = 0
    for number, file in enumerate(files):
        for damage in ("half", "flip", "gone"):
            out = tmp_path / f"{number}-{damage}"
            shutil.copytree(uninterrupted, out)
            victim = out / newest / file
            content = bytearray(victim.read_bytes())
            if damage == "gone":
                victim.unlink()
            elif damage == "half":
                victim.write_bytes(content[: len(content) // 2])
            elif content:
                content[len(content) // 2] ^= 0x55
                victim.write_bytes(content)
            before = contents(out)
            found = finished_or_refused(out)
            if isinstance(found, str):
                refusals += 1
                assert "epoch 4 is damaged: " in found
                assert f"remove {out}/checkpoints/4 to go on" in found
                assert contents(out) == before
            else:
                chex.assert_trees_all_equal(found.state.params, wanted.state.params)
                assert found.history == wanted.history
    assert refusals >= 3, "the arrays and the history, in some way or other"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_changed_history_is_refused(tmp_path, uninterrupted):
    """Digits and letters become others, of which JSON is as good."""
    wanted = finished(uninterrupted)
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    (file,) = (out / "checkpoints" / "4" / "progress").glob("metadata")
    content = file.read_bytes()
    for place in range(0, len(content), len(content) // 50):
        changed = bytearray(content)
        changed[place] ^= 1
        file.write_bytes(changed)
        found = finished_or_refused(out)
        assert isinstance(found, str) or found.history == wanted.history


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--groups", "5"), "--groups 5: num_groups must divide the channels: got num_groups=5"),
        (("--groups", "0"), "--groups: must be 1 or more: got 0"),
        (("--batch-size", "2000"), "--batch-size must be at most the 1437 training images"),
        (("--batch-size", "6", "--devices", "4"), "--devices must divide --batch-size: got 4 for"),
        (("--groups", "a"), "--groups: invalid positive_integer value: 'a'"),
        (
            ("--learning-rate", "nan"),
            "--learning-rate: must be positive and finite in float32: got",
        ),
        (("--learning-rate", "1e300"), "must be positive and finite in float32: got 1e+300"),
        (("--learning-rate", "1e-300"), "must be positive and finite in float32: got 1e-300"),
        (("--learning-rate", "x"), "--learning-rate: invalid positive_number value: 'x'"),
        (("--seed", "x"), "--seed: invalid seed value: 'x'"),
        (("--seed", "-1"), "--seed: must lie in [0, 2**32): got -1"),
        (("--norm", "weight"), "--norm: invalid choice: 'weight'"),
    ],
    ids=str,
)
def test_bad_options_are_told_before_anything_is_written(tmp_path, capsys, options, text):
    out = tmp_path / "run"
    code, errors = refused(capsys, "--out", out, *options)
    assert code == 2
    assert text in errors
    assert not out.exists()


def test_the_help_explains_every_option(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for name in (*SETTINGS, "devices", "out"):
        assert f"--{name.replace('_', '-')}" in text


def test_the_split_is_stratified_and_complete():
    train, test = load()
    assert (len(train.labels), len(test.labels)) == (1437, 360)
    chex.assert_shape(train.images, (1437, 8, 8, 1))
    assert (train.images.min(), train.images.max()) == (0, 1)
    counts = np.bincount(test.labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    everything = np.concatenate([train.images, test.images]).reshape(1797, -1)
    assert len(np.unique(everything, axis=0)) == 1797


def test_an_epoch_has_every_example_once():
    batches = shuffled_batches(jax.random.key(0), 100, 8)
    assert batches.shape == (12, 8)
    assert len(np.unique(batches)) == 96
    assert not np.array_equal(batches, shuffled_batches(jax.random.key(1), 100, 8))


def test_shifting_moves_an_image_by_at_most_a_pixel():
    images = np.zeros((200, 8, 8, 1), np.float32)
    images[:, 4, 4] = 1
    moved = shifted(jax.random.key(0), images)
    places = {tuple(place) for place in np.argwhere(np.asarray(moved))[:, 1:3]}
    assert places == {(row, column) for row in (3, 4, 5) for column in (3, 4, 5)}


def test_each_key_and_each_step_shifts_its_batch_in_another_way():
    train, _ = load()
    batch = train.images[:32], train.labels[:32]
    losses = []
    for key, step in ((0, 0), (1, 0), (0, 1)):
        state = linear_state()
        state = state.replace(step=jnp.asarray(step, jnp.int32))
        losses.append(float(train_step(state, jax.random.key(key), *batch)[1]))
    assert len(set(losses)) == 3


def test_of_a_large_gradient_only_the_direction_counts():
    """AdamW alone would be slow after one that is out of all proportion."""
    state = linear_state()
    ones = jax.tree.map(jnp.ones_like, state.params)
    end = []
    for size in (1e2, 1e6):
        large = jax.tree.map(lambda leaf, size=size: size * leaf, ones)
        after = state.apply_gradients(grads=large).apply_gradients(grads=ones)
        end.append(after.params)
    chex.assert_trees_all_close(*end, rtol=1e-4)


@pytest.mark.parametrize("norm", NORMS)
def test_every_normalization_learns_its_batch(norm):
    train, _ = load()
    state = create_state(Network(norm, channels=8), jax.random.key(0), 1e-2, 100)
    batch = train.images[:32], train.labels[:32]
    state, first, _ = train_step(state, jax.random.key(1), *batch)
    for _ in range(60):
        state, loss, _ = train_step(state, jax.random.key(1), *batch)
    assert loss < 0.9 * first
    assert bool(state.batch_stats) == (norm == "batch")


def test_an_unknown_normalization_is_named():
    with pytest.raises(ValueError, match=r"^norm must be one of group, .*, none: got 'weight'"):
        create_state(Network("weight"), jax.random.key(0), 1e-2, 30)


def test_seeds_train_together_under_vmap_as_they_do_alone():
    train, test = load()
    batch = train.images[:32], train.labels[:32]
    network = Network(channels=8)
    keys = jax.random.split(jax.random.key(0), 3)

    states = jax.jit(jax.vmap(lambda key: create_state(network, key, 1e-3, 10)))(keys)

    @jax.jit
    def trained(state, key):
        state, loss, _ = train_step(state, key, *batch)
        return state, loss, correct_predictions(state, *test)

    def of_seed(seed, states):
        return jax.tree.map(lambda leaf: leaf[seed], states)

    together, losses, correct = jax.device_get(jax.jit(jax.vmap(trained))(states, keys))
    states = jax.device_get(states)
    for seed, key in enumerate(keys):
        alone, loss, correct_alone = trained(of_seed(seed, states), key)
        np.testing.assert_allclose(losses[seed], loss, rtol=1e-5)
        # AdamW's first step is ±1e-4 (a tenth of the rate), whatever the gradient's size.
        difference = jax.tree.map(
            lambda a, b: np.abs(a - b).mean(), of_seed(seed, together.params), alone.params
        )
        assert max(jax.tree.leaves(difference)) < 1e-5
        assert abs(int(correct[seed]) - int(correct_alone)) <= 2


def test_a_saved_state_comes_back_to_the_bit(tmp_path):
    state, history = first_state(), [{"loss": 0.1}]
    with Run(tmp_path / "run", SETTINGS) as directory:
        directory.save(Finished(state, history))
    restored = finished(tmp_path / "run")
    chex.assert_trees_all_equal(restored.state.params, state.params)
    chex.assert_trees_all_equal(restored.state.opt_state, state.opt_state)
    assert restored.history == history
