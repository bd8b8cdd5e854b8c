"""Files that are written whole or not at all."""

import os
import pathlib


def behind_links(file: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(os.path.realpath(file))


def is_device(file: pathlib.Path) -> bool:
    """Whether it is something to write into, such as a pipe, and no file to replace."""
    return file.exists() and not file.is_file()


def write_whole(file: pathlib.Path, content: bytes) -> None:
    """Writes a file as a whole or not at all; what a link points to, and into a device."""
    if is_device(file):
        file.write_bytes(content)
        return
    file = behind_links(file)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)
