"""help(jgn.group_norm) reads in a terminal of 80 columns."""

import pydoc
import sys

import jgn


def test_help_fits_80_columns():
    lines = pydoc.render_doc(jgn.group_norm, renderer=pydoc.plaintext).splitlines()
    if sys.version_info < (3, 13):  # They print any signature on one line.
        lines = [line for line in lines if not line.startswith("group_norm(")]
    assert len(lines) > 40
    assert [line for line in lines if len(line) > 80] == []
