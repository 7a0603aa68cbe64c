"""Checks of the Triton kernels themselves: every configuration by its canary, in float32 in the interpreter."""

from collections.abc import Callable

import torch
from harness import DEVICE, error

from palimpsest.kernels.launch import Launch, forced, planning

# Float32 on both sides, sums of a few hundred terms: some 80 units of 6e-8. A GPU may multiply in tf32 instead.
CLOSE = 5e-6 if not torch.cuda.is_available() else 1e-2


def launches(call: Callable[[], object]) -> list[Launch]:
    """One launch of each kernel and its constants that a call makes, none of which runs."""
    with planning() as plan:
        call()
    assert plan, "no kernel is launched"
    return list({(launch.kernel.name, str(launch.constants)): launch for launch in plan}.values())


def check_configurations(call: Callable[[], object]) -> None:
    """With every configuration of every kernel that a call launches, the canary of its constants comes out right.

    On a CPU one run speaks for all that are the same there: the interpreter knows blocks, and neither warps nor stages,
    and kernels with one canary and one set of constants all run in it with what they prefer.
    """
    seen = set()
    for launch in launches(call):
        configs = launch.kernel.configs(launch.constants)
        for config in configs:
            own = None if config.blocks == configs[0].blocks else (launch.kernel.name, config.blocks)
            run = launch.kernel.canary, str(launch.constants), own
            if DEVICE == "cpu" and run in seen:
                continue
            seen.add(run)
            with forced(launch.kernel, config):
                pairs = launch.kernel.canary(launch.constants)
            assert pairs, f"the canary of {launch.kernel.name} compares nothing"
            for i, (found, wanted) in enumerate(pairs):
                distance = error(found, wanted)
                what = f"{launch.kernel.name}, {config}, pair {i} {tuple(found.shape)}"
                assert wanted.square().mean() > 0 and distance <= CLOSE, f"{what}: {distance:.3g}"
