"""help(jgn.group_norm) reads in a terminal of 80 columns."""

import inspect
import pydoc
import re
import sys

import pytest

import jgn.nnx


def test_help_fits_80_columns():
    lines = pydoc.render_doc(jgn.group_norm, renderer=pydoc.plaintext).splitlines()
    if sys.version_info < (3, 13):  # They print any signature on one line.
        lines = [line for line in lines if not line.startswith("group_norm(")]
    assert len(lines) > 40
    assert [line for line in lines if len(line) > 80] == []


@pytest.mark.parametrize(
    ("documented", "called"),
    [
        (jgn.group_norm, jgn.group_norm),
        (jgn.GroupNorm, jgn.GroupNorm),
        (jgn.nnx.GroupNorm, jgn.nnx.GroupNorm.__init__),
    ],
)
def test_every_argument_is_explained_in_its_order(documented, called):
    text = re.split("(?:Args|Attributes):\n", inspect.getdoc(documented))[1]
    explained = re.findall(r"^    (\w+): ", re.split(r"\n\n\w+:\n", text)[0], re.MULTILINE)
    of_every_layer = {"self", "parent", "name"}
    assert explained == [n for n in inspect.signature(called).parameters if n not in of_every_layer]
