"""What machine code says of a kernel: its matrix instructions, the widths of its loads, its spills.

Counts are static: an instruction in a loop counts once. They compare two compilations of one kernel, and show which
instructions there are; how often each runs they do not say.
"""

import re
import struct
from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

# "        /*0240*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;" as nvdisasm prints it
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_]*)((?:\.[A-Za-z0-9_]+)*)")
_MATRIX = re.compile(r"(?:HG|QG|BG|IG|H|I|D|B|Q|O|UTC[A-Z]*)MMA$")  # HMMA, HGMMA (Hopper), UTCHMMA (Blackwell) …
_NARROW = {"U8": 8, "S8": 8, "U16": 16, "S16": 16}
_CLASSES = (
    ("matrix", _MATRIX),
    ("global load", re.compile(r"LDG|LDGSTS|UTMALDG|UBLKCP")),
    ("global store", re.compile(r"STG|UTMASTG|RED|ATOMG")),
    ("spill", re.compile(r"LDL|STL")),
    ("shared memory", re.compile(r"LDS|STS|LDSM|STSM|LDTM|STTM|ATOMS")),
    ("exponential and such", re.compile(r"MUFU")),
    ("float", re.compile(r"F(FMA|MUL|ADD|SETP|SEL|MNMX|SET|CHK|SWZADD)\w*|H(FMA|MUL|ADD|MNMX|SETP)2\w*")),
    ("conversion", re.compile(r"F2F\w*|F2I\w*|I2F\w*|I2I\w*|I2FP|PRMT")),
    ("barrier and wait", re.compile(r"BAR|(LDG)?DEPBAR|WARPGROUP|WARPSYNC|SYNCS|MEMBAR|FENCE|ERRBAR|UTCBAR|ARRIVES")),
    ("shuffle and vote", re.compile(r"SHFL|VOTE\w*|REDUX|MATCH|ELECT")),
    ("branch", re.compile(r"BRA|EXIT|CALL|RET|BSSY|BSYNC|BRX|JMP|YIELD|BREAK|BPT")),
)  # fmt: skip

# Of .nv.info: the form of an entry after which as many bytes follow as it says, and the two of interest; bytes of a
# symbol.
_FOLLOWS, _STACK, _REGISTERS = 0x04, 0x11, 0x2F
_SYMBOL = 24


@dataclass
class Code:
    """Static counts of a kernel's instructions; ``loads`` and ``stores`` of global memory by bits per thread."""

    instructions: int = 0
    mix: Counter[str] = field(default_factory=Counter)
    matrix: Counter[str] = field(default_factory=Counter)
    loads: Counter[str] = field(default_factory=Counter)
    stores: Counter[str] = field(default_factory=Counter)
    spill_loads: int = 0
    spill_stores: int = 0
    ffma: int = 0


def width(modifiers: list[str]) -> str:
    """Bits per thread of a load or store, from its modifiers; 32 when none says."""
    for word in reversed(modifiers):
        if word in _NARROW:
            return str(_NARROW[word])
        if word in ("64", "128", "256"):
            return word
    return "32"


def sections(cubin: bytes) -> dict[str, bytes]:
    """What each section of a cubin, which is an ELF file, holds, by its name."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    every = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    labels = cubin[every[names][4] :]
    return {labels[s[0] : labels.index(0, s[0])].decode(): cubin[s[4] : s[4] + s[5]] for s in every}


def kernel(cubin: bytes) -> tuple[str, bytes]:
    """Name and machine code of the kernel in a cubin, its section ``.text.*``.

    Raises:
        RuntimeError: when there is none, or more than one.
    """
    found = {name: held for name, held in sections(cubin).items() if name.startswith(".text.")}
    if len(found) != 1:
        raise RuntimeError(f"a cubin had {len(found)} sections of machine code; it must have one")
    ((name, code),) = found.items()
    return name.removeprefix(".text."), code


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread of the kernel and bytes of its stack, as ``cuobjdump -res-usage`` has them, which takes a
    tenth of a second to start.

    They are in ``.nv.info``, a list of (form, what, size) each with so many bytes after it or, in other forms, none;
    here a function, by its number among the symbols, and its figure. Slow paths of a division are functions too.

    Raises:
        RuntimeError: when a figure is not there.
    """
    held, (name, _) = sections(cubin), kernel(cubin)
    labels, table, told = held[".strtab"], held[".symtab"], held.get(".nv.info", b"")
    found: dict[tuple[str, int], int] = {}
    at = 0
    while at < len(told):
        form, what, size = struct.unpack_from("<BBH", told, at)
        at += 4
        if form == _FOLLOWS:
            if what in (_REGISTERS, _STACK):
                function, figure = struct.unpack_from("<II", told, at)
                (start,) = struct.unpack_from("<I", table, function * _SYMBOL)
                found[labels[start : labels.index(0, start)].decode(), what] = figure
            at += size
    if (name, _REGISTERS) not in found or (name, _STACK) not in found:
        raise RuntimeError(f"a cubin told of registers and stacks of {sorted(found)}; it must of {name}")
    return found[name, _REGISTERS], found[name, _STACK]


def read(text: str, sizes: Sequence[int]) -> list[Code]:
    """Count the instructions of kernels that follow each other in ``text``, of so many bytes each."""
    ends, codes = list(accumulate(sizes)), [Code() for _ in sizes]
    for line in text.splitlines():
        found = _LINE.match(line)
        if found is not None and found[2] != "NOP":
            _count(codes[bisect_right(ends, int(found[1], 16))], found[2], found[3].split(".")[1:])
    return codes


def _count(code: Code, name: str, modifiers: list[str]) -> None:
    """Add one instruction."""
    kind = next((kind for kind, pattern in _CLASSES if pattern.fullmatch(name)), "integer and address")
    code.instructions += 1
    code.mix[kind] += 1
    if kind == "matrix":
        code.matrix[name] += 1
    elif name in ("LDG", "LDGSTS"):
        code.loads[width(modifiers)] += 1
    elif kind == "global load":
        code.loads["bulk"] += 1  # the copy engine moves a tile
    elif name == "STG":
        code.stores[width(modifiers)] += 1
    elif kind == "global store":
        code.stores["bulk" if name == "UTMASTG" else "atomic"] += 1
    code.spill_loads += name == "LDL"
    code.spill_stores += name == "STL"
    code.ffma += name.startswith("FFMA")
