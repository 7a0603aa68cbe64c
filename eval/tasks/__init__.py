"""Evaluation tasks, one file each: a generator of examples, a score, and ``run``."""

TASKS = ("perplexity", "passkey")
