"""The mutants that `python tests/mutants.py` tries still have their places in the source."""

import compileall
import shutil

import pytest
from mutants import MUTANTS, ROOT, apply


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_the_source_into_valid_python(mutant, tmp_path):
    shutil.copytree(ROOT / "jgn", tmp_path / "jgn", ignore=shutil.ignore_patterns("__pycache__"))
    before = (tmp_path / "jgn" / mutant.file).read_text()
    apply(mutant, tmp_path / "jgn")
    assert (tmp_path / "jgn" / mutant.file).read_text() != before
    assert compileall.compile_file(tmp_path / "jgn" / mutant.file, quiet=1)


def test_each_mutant_is_named_once():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 25
