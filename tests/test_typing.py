"""The public interface is typed: for a user's strict pyright, and for its check of packages."""

import functools
import json
import os
import pathlib
import shutil
import site
import subprocess
import sys
import sysconfig

import pytest

import jgn

USER = """
from collections.abc import Mapping
from typing import Any, assert_type

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import jgn
import jgn.nnx
from flax import nnx
from jax import Array
from jgn.interop import convert_params, from_torch, to_torch


def plain(x: Array) -> Array:
    return jgn.group_norm(x, 8)


def with_everything(x: Array, scale: Array, mask: np.ndarray[tuple[int, ...], np.dtype[np.bool]]):
    return jgn.group_norm(
        x,
        num_groups=8,
        scale=scale,
        bias=None,
        epsilon=1e-6,
        channel_axis=1,
        reduction_axes=(1, 2, 3),
        mask=mask,
        axis_name=("rows", "columns"),
        axis_index_groups=[[0, 1], [2, 3]],
        activation=jax.nn.silu,
        dtype=jnp.bfloat16,
    )


class Block(nn.Module):
    channels: int
    norm: jgn.GroupNorm = jgn.GroupNorm(num_groups=None, group_size=4, dtype=jnp.float32)

    @nn.compact
    def __call__(self, x: Array, condition: Array, mask: Array | None = None) -> Array:
        scale = nn.Dense(self.channels)(condition)
        x = self.norm(x, mask=mask)
        return jgn.GroupNorm(4, use_scale=False, activation=nn.silu)(x, scale=scale)


class Network(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.norm = jgn.nnx.GroupNorm(8, num_groups=4, activation=nnx.silu, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y = self.norm(x, mask=None)
        assert_type(y, Array)
        assert_type(self.norm.num_groups, int)
        return y


def there_and_back(module: object, params: Mapping[str, Any], x: Array) -> Any:
    layer, variables = from_torch(module)
    assert_type(layer, jgn.GroupNorm)
    print(variables["params"]["scale"].shape, layer.num_groups)
    assert_type(with_everything(x, x, np.ones(3, np.bool)), Array)
    convert_params(params, source="haiku", target="jgn", where=lambda path: "norm" in path)
    return to_torch(layer, variables, num_channels=8)
"""

WRONG = """
import jax
import jgn
from jgn.interop import convert_params

def wrong(x: jax.Array) -> str:
    jgn.group_norm(x, "8")
    jgn.group_norm(x, 8, epsilom=1e-6)
    jgn.GroupNorm(num_group=8)
    convert_params({}, source="caffe", target="jgn")
    return jgn.group_norm(x, 8)
"""


def pyright(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        **options,
    )


@functools.cache
def pyright_runs():
    pytest.importorskip("pyright")
    try:
        return pyright("--version").returncode == 0
    except subprocess.TimeoutExpired:
        return False


@pytest.fixture(autouse=True)
def needs_pyright():
    if not pyright_runs():
        pytest.skip("pyright cannot run here: it needs node, or a connection to fetch it")


def errors_of(code, directory):
    (directory / "user.py").write_text(code)
    (directory / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    result = pyright("--pythonpath", sys.executable, cwd=directory)
    report = json.loads(result.stdout)
    assert report["summary"]["filesAnalyzed"] == 1
    return [
        (problem["range"]["start"]["line"], problem["rule"], problem["message"])
        for problem in report["generalDiagnostics"]
    ]


def test_a_users_strict_project_has_no_error(tmp_path):
    assert errors_of(USER, tmp_path) == []


def test_a_users_mistakes_are_found(tmp_path):
    found = [line for line, _, _ in errors_of(WRONG, tmp_path)]
    assert found == [number for number, line in enumerate(WRONG.splitlines()) if "    " in line]


def test_no_public_name_lacks_a_type(tmp_path):
    """pyright's check of a package that promises types, as installed in an environment."""
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    base = {"base": environment, "platbase": environment}
    packages = pathlib.Path(sysconfig.get_path("purelib", vars=base))
    shutil.copytree(pathlib.Path(jgn.__file__).parent, packages / "jgn")
    (packages / "rest.pth").write_text("\n".join(site.getsitepackages()))
    binaries = pathlib.Path(sysconfig.get_path("scripts", vars=base))
    result = pyright(
        "--verifytypes",
        "jgn",
        "--ignoreexternal",
        cwd=tmp_path,
        env={
            **os.environ,
            "VIRTUAL_ENV": str(environment),
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
        },
    )
    symbols = json.loads(result.stdout)["typeCompleteness"]["symbols"]
    public = [symbol for symbol in symbols if "bench." not in symbol["name"] + "."]
    public = [symbol for symbol in public if "examples." not in symbol["name"] + "."]
    assert {"jgn.group_norm", "jgn.GroupNorm", "jgn.nnx.GroupNorm", "jgn.interop.from_torch"} <= {
        symbol["name"] for symbol in public
    }
    assert [symbol["name"] for symbol in public if not symbol["isTypeKnown"]] == []
