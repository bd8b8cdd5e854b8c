"""The process of one contender: a request a line on its input, an answer a line on its output."""

import json
import os
import sys
from typing import Any

import numpy as np

from jgn.bench import contenders
from jgn.bench.workloads import Workload


def answer(request: dict[str, Any], state: dict[str, Any]) -> Any:
    """Prepares a workload, or times one of its calls; `state` holds what is prepared."""
    match request:
        case {"prepare": fields, "contender": name, **options}:
            state.clear()
            workload = Workload(*fields)._replace(shape=tuple(fields[2]))
            contender = contenders.make(name, workload, **options)
            state.update(contender=contender, platform=options["platform"])
            for call in contender.calls.values():
                call()
            if isinstance(contender, contenders.Floor):
                return {}
            x, scale, bias, _ = workload.inputs(options["seed"])
            wanted = contenders.reference(x.astype(options["dtype"]), scale, bias, workload)
            error = np.abs(contender.output() - wanted).max() / np.abs(wanted).max()
            return {**contender.facts(), "error": float(error)}
        case {"time": call, "seconds": seconds}:
            return contenders.times(state["contender"].calls[call], seconds, **state)
        case {"device": _}:
            import jax

            device = jax.devices()[0]
            return {"platform": device.platform, "device": device.device_kind}
    raise ValueError(f"unknown request: {request}")


def main() -> None:
    # Whatever else prints, compilers included, stays out of the answers.
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    state = {}
    for line in sys.stdin:
        try:
            reply = {"answer": answer(json.loads(line), state)}
        except Exception as error:  # The benchmark goes on without this contender, and says so.
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
