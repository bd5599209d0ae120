"""Machinery of the scripts at the root: skip it at first reading. Nothing in here imports a root file."""
