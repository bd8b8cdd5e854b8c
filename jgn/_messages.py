"""How messages show what came."""

from typing import Any


def shown(value: Any) -> str:
    """What represents the value: one line of 60 characters at most."""
    line = " ".join(repr(value).split())
    return line if len(line) <= 60 else line[:59] + "…"
