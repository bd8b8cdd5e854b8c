"""Compares jgn with other implementations on this machine: python -m jgn.bench --help."""
