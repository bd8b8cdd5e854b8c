"""What is written is there as a whole or not at all, wherever it is written."""

import os
import pathlib

import pytest

from jgn._files import write_whole


@pytest.mark.parametrize("name", ["file", "link"])
def test_a_file_is_written_whole_or_not_at_all_through_a_link_too(tmp_path, monkeypatch, name):
    file, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(file)
    write_whole(tmp_path / name, b"first")
    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "replace", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            write_whole(tmp_path / name, b"second")
    assert file.read_bytes() == b"first"
    assert link.is_symlink()
    assert set(tmp_path.iterdir()) == {file, link}


def test_a_pipe_is_written_into(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with open(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), "rb") as reader:
        write_whole(pipe, b"first")
        assert reader.read() == b"first"
    assert pipe.is_fifo()
