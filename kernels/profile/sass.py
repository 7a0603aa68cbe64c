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


def instructions(cubin: bytes) -> bytes:
    """The machine code of a cubin that holds one kernel: what its section ``.text.*`` has, by the ELF's own table.

    Raises:
        RuntimeError: when there is none, or more than one.
    """
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names = struct.unpack_from("<3H", cubin, 58)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    labels = cubin[sections[names][4] :]
    code = [cubin[s[4] : s[4] + s[5]] for s in sections if labels[s[0] :].startswith(b".text.")]
    if len(code) != 1:
        raise RuntimeError(f"a cubin had {len(code)} sections of machine code; it must have one")
    return code[0]


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
