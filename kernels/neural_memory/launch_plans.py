"""How many warps, and how much pipelining, the kernels of neural memory have: by the memory, and by the GPU.

What decides is where the compiler runs out of registers: of the 255 that there are it gives a thread fewer where it
takes a program for a small one, and then spills with eight warps what fits in four. Two stages let a loop's next
operands wait in shared memory instead. docs/neural_memory.md says which had spills without; the command ``python -m
palimpsest.kernels.profile variants --only neural_memory`` compiles them for every GPU. Narrow blocks of hidden units
spill least.
"""

from collections.abc import Mapping
from typing import Any

from ..launch import Config, architecture

AMPERE, BLACKWELL = 80, 100


def plan(warps: int = 8, stages: int = 1, **blocks: int) -> Config:
    """Blocks of 16 hidden units, and others."""
    return Config((("BF", 16), *blocks.items()), warps, stages)


def small(constants: Mapping[str, Any]) -> bool:
    """Whether a program needs few registers, and so is given too few. Three matrices need many, and so does muon."""
    few = constants["LAYERS"] == 2 and constants["D"] * constants["F"] <= 4096
    return few and constants["TURN"][0] == "none"


def narrow(constants: Mapping[str, Any]) -> bool:
    """Whether it is a linear memory with narrow heads."""
    return constants["LAYERS"] == 1 and constants["D"] <= 32


def large(constants: Mapping[str, Any]) -> bool:
    """Whether it has wide heads in steps of 16, which leave room in shared memory."""
    return constants["LAYERS"] > 1 and constants["D"] > 64 and constants["C"] == 16


def walk(constants: Mapping[str, Any], most: int) -> Config:
    """Of kernels that walk steps one after the other: eight warps, which hold the most registers, but fewer for a small
    memory of at most so many hidden units."""
    if large(constants):
        return plan(stages=2)
    few = small(constants) and constants["F"] <= most
    return plan(max(4, constants["C"] // 8) if few else 8)


def states_plan(constants: Mapping[str, Any]) -> list[Config]:
    """As all that walks, but two warps for steps of 16 of a small memory, and four for what eight are given too few
    registers for. Muon takes fewer tokens at a time on Blackwell."""
    layers, settle, arch = constants["LAYERS"], constants["SETTLE"][0], architecture()
    wide, turns = constants["D"] > 64, constants["TURN"][0] != "none"
    if turns and layers > 1 and arch == BLACKWELL:
        return [plan(ROWS=16)]
    if small(constants) and constants["C"] == 16:
        return [plan(2)]
    if narrow(constants):
        waits = {AMPERE: turns or settle == "kl", BLACKWELL: settle == "norm"}
        return [plan(4, 2 if arch is not None and waits.get(arch) else 1)]
    four = (
        (layers == 1 and wide and constants["MOMENTUM"] and arch == AMPERE)
        or (layers == 2 and settle == "kl" and wide and not large(constants))
        or (layers == 2 and settle == "lq" and constants["C"] == 64 and arch == BLACKWELL)
        or (layers == 3 and wide and not constants["MOMENTUM"] and arch == AMPERE)
        or (layers > 1 and turns and (layers == 3 or arch == AMPERE))
    )
    return [plan(4) if four else walk(constants, 64)]


def reads_plan(constants: Mapping[str, Any]) -> list[Config]:
    """Where programs are many: four warps, of which each has 16 rows of a step to itself; for few hidden units eight,
    but for the short steps of a small memory on Blackwell; for wide heads either, of which some memories spill with
    eight on Ampere, or on Blackwell (linear, with momentum), and others with four (lq, and on Blackwell many hidden
    units without momentum); but of three matrices four."""
    if large(constants):
        return [plan(stages=2)]
    arch = architecture()
    if constants["D"] > 64 and constants["LAYERS"] < 3:
        settle, alone = constants["SETTLE"][0], not constants["MOMENTUM"]
        if constants["LAYERS"] == 1 and not alone and arch == BLACKWELL:
            return [plan(4)]
        eight = arch == BLACKWELL and alone and constants["F"] > 256
        eight |= arch in (AMPERE, BLACKWELL) and alone and settle == "lq"
        return [plan(8)] if eight else [plan(8), plan(4)]
    few = constants["F"] <= 64 and constants["C"] >= (64 if small(constants) and arch == BLACKWELL else 32)
    return [plan(8 if few else 4)]


def reads_backward_plan(constants: Mapping[str, Any]) -> list[Config]:
    """As all that walks; four warps for narrow linear memories whose columns a chunk's end scales, on Blackwell."""
    if narrow(constants) and constants["SETTLE"][0] == "norm" and architecture() == BLACKWELL:
        return [plan(4)]
    return [walk(constants, 64)]


def carry_plan(constants: Mapping[str, Any]) -> list[Config]:
    """As all that walks, with fewer warps for every small memory; four for muon on Blackwell, which have registers for
    all tokens of a step; two stages on Ampere for wide heads of three matrices, or whose columns a chunk's end
    scales."""
    layers, arch = constants["LAYERS"], architecture()
    if layers > 1 and constants["TURN"][0] != "none" and arch == BLACKWELL:
        return [plan(4, ROWS=64)]
    if constants["D"] > 64 and arch == AMPERE and (layers == 3 or (layers == 2 and constants["SETTLE"][0] == "norm")):
        return [plan(stages=2)]
    return [walk(constants, 128)]
