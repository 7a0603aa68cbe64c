"""Measurements of the operations: memory, and side-by-side timings with other packages under ``peers/``."""
