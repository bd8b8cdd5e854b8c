"""The digits example: it learns, goes on to the bit where it was stopped, and loses nothing."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

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
from jgn.examples.digits.__main__ import main
from jgn.examples.digits.checkpoints import Finished, Run, RunError
from jgn.examples.digits.training import shifted

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
def test_the_batch_is_split_over_as_many_devices_as_asked_for():
    program = (
        "from jgn.examples.digits.__main__ import _parser, _shardings\n"
        "replicated, split = _shardings(2, _parser())\n"
        "assert len(split.device_set) == len(replicated.device_set) == 2\n"
        "assert split.shard_shape((4,)) == (2,) and replicated.shard_shape((4,)) == (4,)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, env=ENVIRONMENT, timeout=120)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="compilers write files of their own")
def test_a_full_disk_ends_it_and_keeps_the_epochs_before(tmp_path, uninterrupted):
    out = tmp_path / "run"
    stop(out, 1, signal.SIGKILL)
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
        (("--learning-rate", "nan"), "--learning-rate: must be positive and finite: got nan"),
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

    def create(key):
        return create_state(network, key, 1e-3, 10)

    together, losses, _ = jax.vmap(train_step, (0, 0, None, None))(
        jax.vmap(create)(keys), keys, *batch
    )
    correct = jax.vmap(correct_predictions, (0, None, None))(together, *test)
    for seed, key in enumerate(keys):
        alone, loss, _ = train_step(create(key), key, *batch)
        np.testing.assert_allclose(losses[seed], loss, rtol=1e-5)
        # AdamW's first step is ±1e-4 (a tenth of the rate), whatever the gradient's size.
        of_seed = jax.tree.map(lambda leaf, seed=seed: leaf[seed], together.params)
        difference = jax.tree.map(lambda a, b: jnp.abs(a - b).mean(), of_seed, alone.params)
        assert max(jax.tree.leaves(difference)) < 1e-5
        assert abs(int(correct[seed]) - int(correct_predictions(alone, *test))) <= 2


def test_a_saved_state_comes_back_to_the_bit(tmp_path):
    state, history = first_state(), [{"loss": 0.1}]
    with Run(tmp_path / "run", SETTINGS) as directory:
        directory.save(Finished(state, history))
    restored = finished(tmp_path / "run")
    chex.assert_trees_all_equal(restored.state.params, state.params)
    chex.assert_trees_all_equal(restored.state.opt_state, state.opt_state)
    assert restored.history == history
