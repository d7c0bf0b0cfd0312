"""Measurements. Each module is a command: ``python -m tools.bench.loop --help``."""
