"""The comparison over batch sizes and groups: its settings, its file, and bad options."""

import json
import os

import jax
import pytest

from jgn.examples import batch_size
from jgn.examples.batch_size import main, settings
from jgn.examples.batch_size import test_errors as errors_of_training
from jgn.examples.digits import load
from jgn.examples.digits.data import Digits

NO_RESULTS = "it is no file of results; choose another --out."


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    """Training takes an hour; each setting ends with two errors, the last of two epochs'."""
    trained = []

    def test_errors(train, test, **setting):
        trained.append(setting)
        yield from ([0.5, 0.5], [0.25, 0.125])

    monkeypatch.setattr(batch_size, "test_errors", test_errors)
    monkeypatch.setattr(batch_size, "load", lambda: (None, None))
    return trained


def arguments(out, epochs=2, seeds=2):
    return ["--out", str(out), "--epochs", str(epochs), "--seeds", str(seeds)]


def test_each_seed_learns_in_its_own_way():
    train, test = load()
    few = Digits(train.images[:512], train.labels[:512])
    options = {"epochs": 6, "seeds": 2, "batch_size": 32, "norm": "none", "groups": 4}
    with jax.numpy_dtype_promotion("standard"):  # As optax needs.
        epochs = list(errors_of_training(few, test, **options))
    assert [len(errors) for errors in epochs] == [2] * 6
    assert max(epochs[-1]) < 0.5 < min(epochs[0]), "by chance it is 0.9"
    assert any(first != second for first, second in epochs)


@pytest.mark.parametrize(("images", "learning_rate"), [(32, 0.003), (128, 0.006), (2, 0.00075)])
def test_the_learning_rate_grows_as_the_root_of_the_batch(monkeypatch, images, learning_rate):
    train, test = load()
    rates = []

    def create_state(network, key, learning_rate, total_steps):
        rates.append(learning_rate)
        raise StopIteration

    monkeypatch.setattr(batch_size, "create_state", create_state)
    options = {"epochs": 1, "seeds": 1, "batch_size": images, "norm": "none", "groups": 4}
    with pytest.raises(RuntimeError, match="StopIteration"):
        next(errors_of_training(train, test, **options))
    assert rates == [pytest.approx(learning_rate)]


def test_every_epoch_has_an_order_of_its_own(monkeypatch):
    train, test = load()
    few = Digits(train.images[:64], train.labels[:64])
    orders = []

    def shuffled_batches(key, examples, images):
        jax.debug.callback(
            lambda data: orders.append(tuple(data.tolist())), jax.random.key_data(key)
        )
        return jax.numpy.arange(examples).reshape(-1, images)

    monkeypatch.setattr(batch_size, "shuffled_batches", shuffled_batches)
    options = {"epochs": 3, "seeds": 1, "batch_size": 32, "norm": "none", "groups": 4}
    with jax.numpy_dtype_promotion("standard"):  # As optax needs.
        list(errors_of_training(few, test, **options))
    assert len(set(orders)) == 3


def test_every_setting_is_trained_once_and_written(tmp_path, no_training):
    out = tmp_path / "errors.json"
    assert main(arguments(out)) == 0
    report = json.loads(out.read_text())
    assert [result["setting"] for result in report["results"]] == settings()
    assert all(result["test_errors"] == [0.25, 0.125] for result in report["results"])
    assert no_training == [{"epochs": 2, "seeds": 2, **setting} for setting in settings()]
    assert list(tmp_path.iterdir()) == [out]


def test_it_goes_on_where_it_stopped(tmp_path, no_training):
    out = tmp_path / "errors.json"
    main(arguments(out))
    report = json.loads(out.read_text())
    kept, left = report["results"][:5], settings()[5:]
    out.write_text(json.dumps({**report, "results": kept}))
    no_training.clear()
    assert main(arguments(out)) == 0
    assert [setting["norm"] for setting in no_training] == [setting["norm"] for setting in left]
    assert json.loads(out.read_text()) == report


def test_an_interrupt_ends_it_with_130_and_tells_how_much_is_kept(tmp_path, capsys, monkeypatch):
    out = tmp_path / "errors.json"

    def test_errors(train, test, *, norm, **_):
        if norm == "layer":
            raise KeyboardInterrupt
        yield [0.5, 0.5]

    monkeypatch.setattr(batch_size, "test_errors", test_errors)
    assert main(arguments(out)) == 130
    assert capsys.readouterr().err == (
        f"stopped; 5 finished settings are kept in {out}, "
        "and the same command goes on from there.\n"
    )
    results = json.loads(out.read_text())["results"]
    assert [result["setting"] for result in results] == settings()[:5]


@pytest.mark.parametrize("options", [{"epochs": 0}, {"seeds": 0}, {"seeds": -1}])
def test_counts_are_positive(tmp_path, capsys, options):
    with pytest.raises(SystemExit, match="2"):
        main(arguments(tmp_path / "errors.json", **options))
    (value,) = options.values()
    assert f"must be 1 or more: got {value}" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_an_error_of_the_training_is_not_taken_for_one_of_the_file(tmp_path, monkeypatch):
    def failing(*_, **__):
        raise ValueError("of the training")

    monkeypatch.setattr(batch_size, "test_errors", failing)
    with pytest.raises(ValueError, match="of the training"):
        main(arguments(tmp_path / "errors.json"))


def test_a_file_that_cannot_be_written_is_told_before_any_work(tmp_path, capsys, no_training):
    out = tmp_path / "missing" / "errors.json"
    assert main(arguments(out)) == 1
    assert f"error: {out}: [Errno 2] No such file or directory" in capsys.readouterr().err
    assert not no_training


def test_a_pipe_is_refused(tmp_path, capsys, no_training):
    out = tmp_path / "pipe"
    os.mkfifo(out)  # To read it would take forever.
    assert main(arguments(out)) == 1
    assert capsys.readouterr().err == f"error: {out}: {NO_RESULTS}\n"
    assert not no_training


def test_results_go_where_a_link_points_to(tmp_path):
    out, link = tmp_path / "errors.json", tmp_path / "link"
    link.symlink_to(out)
    assert main(arguments(link)) == 0
    assert link.is_symlink()
    assert len(json.loads(out.read_text())["results"]) == len(settings())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            '{"epochs": 3, "seeds": 2, "channels": 16, "results": []}',
            "it has results of other options; choose another --out.",
        ),
        (
            '{"epochs": 2, "seeds": 2, "channels": 8, "results": []}',
            "it has results of other options; choose another --out.",
        ),
        ("not JSON", NO_RESULTS),
        ('{"epochs": 2}', NO_RESULTS),
        ("[]", NO_RESULTS),
        *(
            (f'{{"epochs": 2, "seeds": 2, "channels": 16, "results": {results}}}', NO_RESULTS)
            for results in ("3", "[3]", '[{"setting": {}}]')
        ),
    ],
)
def test_another_file_is_refused_and_stays_as_it_is(tmp_path, capsys, no_training, text, reason):
    out = tmp_path / "errors.json"
    out.write_text(text)
    assert main(arguments(out)) == 1
    assert capsys.readouterr().err == f"error: {out}: {reason}\n"
    assert out.read_text() == text
    assert not no_training
