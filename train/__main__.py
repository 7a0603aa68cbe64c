"""``python -m palimpsest.train CONFIG key=value …``, alone or under ``torchrun``.

Exit codes: 0 complete, or stopped by SIGTERM, SIGINT or SIGUSR1 with everything saved (the same command goes on);
1 training diverged or the machine failed; 2 the command, the config or the corpus is wrong.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from .checkpoint import CheckpointError
from .config import ConfigError, parse_overrides, read_config
from .data import DataError
from .dry_run_text import add_options, refuse_without
from .dry_run_text import run as dry_run
from .loop import TrainingDiverged, train


def main(arguments: Sequence[str] | None = None) -> int:
    """Train as the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="palimpsest-train", description="Train a model from a config.")
    parser.add_argument("config", help="a YAML file, or a name inside the package's configs, like tiny/titans_mag")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="like train.steps=500 model.dim=64")
    parser.add_argument("--resume", metavar="auto|never|PATH", help="the same as train.resume=…")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and do nothing else")
    add_options(parser)
    options = parser.parse_intermixed_args(arguments)
    _log_to_stderr()
    try:
        overrides = parse_overrides(options.overrides)
        if options.resume is not None:
            overrides["train.resume"] = options.resume
        config = read_config(options.config, overrides)
        if options.print_config:
            print(config.to_yaml(), end="")
            return 0
        if options.dry_run:
            dry_run(config, options)
            return 0
        refuse_without(options)
        summary = train(config)
    except (ConfigError, DataError, ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingDiverged, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if os.environ.get("RANK", "0") == "0":
        print(f"{summary.status}: {summary.step} of {config.train.steps} steps, in {summary.folder}")
    return 0


def _log_to_stderr() -> None:
    """The package's log lines from the first process; from the others only what is wrong."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    root = logging.getLogger("palimpsest")
    root.addHandler(handler)
    root.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)


if __name__ == "__main__":
    sys.exit(main())
