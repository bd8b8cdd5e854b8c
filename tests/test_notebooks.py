"""Every notebook runs as it stands in the repository, and shows a picture on its first screen."""

import os
import pathlib
import time

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted(pathlib.Path(__file__).parents[1].glob("notebooks/*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# Its kernel speaks over loopback, and its clean-up belongs to no test.
@pytest.mark.filterwarnings("default")
def test_it_runs(path, monkeypatch):
    monkeypatch.setitem(os.environ, "JAX_PLATFORMS", "cpu")
    notebook = nbformat.read(path, as_version=4)
    start = time.monotonic()
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": path.parent}}).execute()
    assert time.monotonic() - start < 120
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    assert not [o.text for o in outputs if o.get("name") == "stderr"], "no warning, either"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_kept_with_a_picture_first(path):
    notebook = nbformat.read(path, as_version=4)
    programs = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in programs)
    assert any("image/png" in output.get("data", {}) for output in programs[0].outputs)


def test_there_are_notebooks():
    assert NOTEBOOKS
