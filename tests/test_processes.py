"""Two processes of two devices each train what one process of four devices trains."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

WORKER = pathlib.Path(__file__).with_name("data_parallel_worker.py")


def free_address():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{listener.getsockname()[1]}"


def start(processes, steps, out):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    address = free_address()
    return [
        subprocess.Popen(
            [sys.executable, WORKER, address, str(processes), str(number), str(steps), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "JAX_PLATFORMS": "cpu"},
        )
        for number in range(processes)
    ]


def parameters(path):
    with np.load(path) as arrays:
        return dict(arrays)


def test_two_processes_train_what_one_trains(tmp_path):
    steps = 5
    for processes in (1, 2):
        workers = start(processes, steps, tmp_path / f"{processes}.npz")
        try:
            for worker in workers:
                _, errors = worker.communicate(timeout=180)
                assert worker.returncode == 0, errors
        finally:
            for worker in workers:
                worker.kill()
    one, two = (parameters(tmp_path / f"{processes}.npz") for processes in (1, 2))
    assert one.keys() == two.keys()
    # The same parts of each batch; the gradients of the parts are added in another order. Seen:
    # 1.2e-7 after 5 steps.
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=0, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("number", [0, 1])  # The first is the coordinator.
def test_a_process_that_dies_ends_the_other_with_a_message_within_a_minute(tmp_path, number):
    workers = start(2, f"die {number}", tmp_path / "never.npz")
    dying, survivor = workers[number], workers[1 - number]
    try:
        dying.communicate(timeout=180)
        assert dying.returncode == 1
        death = time.monotonic()
        output, errors = survivor.communicate(timeout=60)
        assert time.monotonic() - death < 60
    finally:
        survivor.kill()
    assert survivor.returncode != 0
    assert "step 0" in output, errors  # It had begun.
    assert re.search(r"stopped sending heartbeats|Connection (closed|reset)|unavailable", errors)
