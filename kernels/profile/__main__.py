"""python -m palimpsest.kernels.profile COMMAND: what the kernels cost, with a GPU and without.

report    costs, floors and compiled kernels of every operation; no GPU needed
budgets   compile every kernel for GPUs that need not be there, and compare with what each may use
variants  compile what the operations list beyond their plans: does any of it spill
bench     times beside the reference, chunked torch and other packages
compare   two result files of bench, with a threshold
canaries  every kernel's canary with every configuration; GPU, or the interpreter
gpu       conformance, canaries, bench and training speed on a GPU, written to docs/results
"""

import argparse
import sys
from collections.abc import Sequence

from . import bench, budgets, canaries, compare, gpu, report, variants

COMMANDS = {
    "report": report,
    "budgets": budgets,
    "variants": variants,
    "bench": bench,
    "compare": compare,
    "canaries": canaries,
    "gpu": gpu,
}


def main(words: Sequence[str] | None = None) -> int:
    """Run a command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m palimpsest.kernels.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        own = commands.add_parser(
            name, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(own)
    args = parser.parse_args(words)
    return COMMANDS[args.command].main(args)


if __name__ == "__main__":
    sys.exit(main())
