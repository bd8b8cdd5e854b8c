"""One of several processes that train the digits network together; see test_processes.py.

Arguments: the coordinator's address, how many processes, this one's number, how many steps, and
the file that process 0 writes the parameters to. With one process there is no coordinator. With
"die 1" in place of the steps, process 1 ends after its first step without a word.
"""

import os
import sys

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jgn.examples.digits import Network, create_state, load, shuffled_batches, train_step

BATCH_SIZE = 64


def train(processes, number, steps, out):
    mesh = jax.make_mesh((jax.device_count(),), ("batch",), (AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("batch"))
    replicated = NamedSharding(mesh, PartitionSpec())
    digits, _ = load()
    key = jax.random.key(0)
    batches = np.asarray(shuffled_batches(key, len(digits.labels), BATCH_SIZE))
    first = jax.device_get(create_state(Network(), key, 3e-3, len(batches)))
    state = jax.tree.map(lambda leaf: jax.make_array_from_callback(
        np.shape(leaf), replicated, lambda index: np.asarray(leaf)[index]
    ), first)  # fmt: skip
    dies = steps == f"die {number}"
    for step, indices in enumerate(batches[: None if steps.startswith("die") else int(steps)]):
        own = np.split(indices, processes)[number]
        images, labels = (
            jax.make_array_from_process_local_data(split, part[own]) for part in digits
        )
        state, loss, _ = train_step(state, key, images, labels)
        print(f"step {step}: loss {float(loss):.6f}", flush=True)
        if dies:
            os._exit(1)
    if number == 0:
        np.savez(out, **flatten_dict(jax.device_get(state.params), sep="/"))


if __name__ == "__main__":
    address, processes, number, steps, out = sys.argv[1:]
    processes, number = int(processes), int(number)
    jax.config.update("jax_num_cpu_devices", 4 // processes)
    if processes > 1:
        jax.distributed.initialize(address, processes, number, heartbeat_timeout_seconds=10)
    train(processes, number, steps, out)
